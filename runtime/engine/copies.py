"""Saved values that are copies of smaller ones, or masks made of numbers that are known anyway.

Attention with fewer keys than queries is captured as a copy of each key per query, and its causal
mask as numbers for every pair of positions; a partitioner saves both for the backward, where eager
keeps the keys as they are, and no mask. The backward copies the keys, and makes the mask, anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt.analysis.aliasing import is_view, storage_of
from graphopt.runtime.engine.halves import Halves, copy_graph

aten = torch.ops.aten
LONGEST = 32
"""Operators that are repeated at most for one value."""

_MADE = {
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default),
    *(aten.ones.default, aten.scalar_tensor.default, aten.zeros.default),
}


@dataclass(frozen=True)
class _Chain:
    """How a saved value comes from others: what is repeated, in order, and where that begins."""

    nodes: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]


def save_sources(halves: Halves) -> Halves:
    """Halves that save what such values are made of, where that is at most half as large."""
    forward, backward = (copy_graph(m.graph) for m in (halves.forward, halves.backward))
    arguments = backward.find_nodes(op="placeholder")
    source = dict(zip(arguments, halves.sources, strict=True))
    output = forward.output_node()
    returned = list(cast("Sequence[Any]", output.args[0]))
    count = len(returned) - sum(kind == "saved" for kind, _ in halves.sources)
    inputs = forward.find_nodes(op="placeholder")
    given: dict[fx.Node, fx.Node] = {}  # by the node of the forward, the argument of the backward
    for argument, (kind, index) in source.items():
        values = {"saved": returned[count:], "input": inputs}.get(kind, [])
        if values and isinstance(values[index], fx.Node):
            given[values[index]] = argument
    owner = storage_of(forward.nodes).owner
    outputs = {owner[v] for v in returned[:count] if isinstance(v, fx.Node)}
    saved = [v for v in given if source[given[v]][0] == "saved" and not _is_recorded(given[v])]
    changed = False
    for value in sorted(saved, key=_bytes, reverse=True):
        held = outputs | {owner[v] for v in given if v is not value}
        chain = _chain(value, given)
        if owner[value] in held or chain is None:
            continue
        fresh = {owner[root] for root in chain.roots} - held
        if not 2 * sum(map(_bytes, fresh)) <= _bytes(owner[value]):
            continue
        argument = given.pop(value)
        for root in chain.roots:
            if root not in given:
                with backward.inserting_before(argument):
                    given[root] = backward.placeholder(root.name)
                given[root].meta = dict(root.meta)
                source[given[root]] = ("saved", len(returned) - count)
                returned.append(root)
        _repeat(backward, argument, chain, given, halves)
        changed = True
    return _made(halves, forward, backward, returned, count, source) if changed else halves


def _is_recorded(argument: fx.Node) -> bool:
    """Whether the backward of an opaque operator reads it: its record is of this very tensor."""
    return any(
        isinstance(user.target, torch._ops.OpOverload)
        and any(one.name == "tape" for one in user.target._schema.arguments)
        for user in argument.users
    )


def _chain(value: fx.Node, given: Mapping[fx.Node, fx.Node]) -> _Chain | None:
    nodes: dict[fx.Node, None] = {}
    roots: dict[fx.Node, None] = {}
    waiting = [(value, False)]
    while waiting:
        node, is_done = waiting.pop()
        if node in nodes or node in roots:
            continue
        if is_done:
            nodes[node] = None
        elif (node in given and node is not value) or not _is_cheap(node):
            roots[node] = None
        else:
            waiting.append((node, True))
            waiting += [(n, False) for n in node.all_input_nodes]
        if len(nodes) + len(waiting) > 2 * LONGEST:
            return None
    # What the caller may change before the backward is not read anew, nor are numbers saved.
    is_safe = all(root in given or (root.op != "placeholder" and _bytes(root)) for root in roots)
    return _Chain(tuple(nodes), tuple(roots)) if nodes and value in nodes and is_safe else None


def _is_cheap(node: fx.Node) -> bool:
    """Whether an operator moves values, or computes with whole numbers and truth values."""
    if node.op == "get_attr":
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    if is_view(node.target) or node.target is aten.clone.default or node.target in _MADE:
        return True
    made = torch.Tag.pointwise in node.target.tags or node.target is aten.index.Tensor
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return False
    return made and all(map(_is_whole, node.all_input_nodes))


def _is_whole(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op == "get_attr" and value is None:
        value = getattr(node.graph.owning_module, str(node.target), None)
    is_number = isinstance(value, Tensor) and value.dim() == 0
    return isinstance(value, Tensor) and (is_number or not value.dtype.is_floating_point)


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(type(n) is not int for n in value.shape):
        return 0
    # Not `nbytes`, which a symbolic offset into a known size forbids.
    return math.prod(value.shape) * value.dtype.itemsize


def _repeat(
    graph: fx.Graph,
    argument: fx.Node,
    chain: _Chain,
    given: Mapping[fx.Node, fx.Node],
    halves: Halves,
) -> None:
    """Make a value in the backward, in front of its first reader."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    env = {root: given[root] for root in chain.roots}
    with graph.inserting_before(min(argument.users, key=order.__getitem__)):
        for node in chain.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "get_attr":
                name = str(node.target)
                setattr(halves.backward, name, getattr(halves.forward, name))
    argument.replace_all_uses_with(env[chain.nodes[-1]])
    graph.erase_node(argument)


def _made(
    halves: Halves,
    forward: fx.Graph,
    backward: fx.Graph,
    returned: list[Any],
    count: int,
    source: Mapping[fx.Node, tuple[str, int]],
) -> Halves:
    """Halves of these graphs, with saved values numbered anew."""
    sources: list[tuple[str, int]] = []
    kept: list[Any] = []
    for argument in backward.find_nodes(op="placeholder"):
        kind, index = source[argument]
        if kind == "saved":
            kept.append(returned[count + index])
            index = len(kept) - 1
        sources.append((kind, index))
    forward.output_node().args = ((*returned[:count], *kept),)
    return replace(
        halves,
        forward=fx.GraphModule(halves.forward, forward),
        backward=fx.GraphModule(halves.backward, backward),
        sources=tuple(sources),
    )
