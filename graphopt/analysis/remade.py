"""Values that a backward can make anew for less than it takes to keep them.

They come, by moving values and by computing with whole numbers alone, from others of at most half
their bytes: keys copied per query, masks made of positions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.aliasing import is_view

aten = torch.ops.aten
LONGEST = 32
"""Operators that are repeated at most for one value."""

_MADE = {
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default),
    *(aten.ones.default, aten.scalar_tensor.default, aten.zeros.default),
}


@dataclass(frozen=True)
class Chain:
    """How a value comes from others: what is repeated, in order, and where that begins."""

    nodes: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]


def chain_of(value: fx.Node, given: Collection[fx.Node]) -> Chain | None:
    """How a value is made anew; ``None`` where that is not cheap, or reads what may change.

    Args:
        value: what is made.
        given: values that are there in any case.
    """
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
    is_safe = all(root in given or (root.op != "placeholder" and bytes_of(root)) for root in roots)
    return Chain(tuple(nodes), tuple(roots)) if nodes and value in nodes and is_safe else None


def bytes_of(node: fx.Node) -> int:
    """Bytes of a value whose size is known; 0 of others."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(type(n) is not int for n in value.shape):
        return 0
    # Not `nbytes`, which a symbolic offset into a known size forbids.
    return math.prod(value.shape) * value.dtype.itemsize


def remade_in_backward(graph: fx.Graph) -> fx.Graph:
    """A copy of a joint graph in which the backward makes such values anew.

    It computes the same, and holds less in between; its placeholders, results and all other nodes
    have the order and the names that they had.
    """
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = copy.node_copy(node, lambda n: env[n])
    given = set(graph.find_nodes(op="placeholder"))
    seen: set[fx.Node] = set()
    for reader in graph.nodes:
        if reader.op == "output" or not _is_backward(reader):
            continue
        for value in reader.all_input_nodes:
            if value.op != "call_function" or _is_backward(value) or value in seen:
                continue
            seen.add(value)  # its first reader
            chain = chain_of(value, given)
            if chain is not None and 2 * sum(map(bytes_of, chain.roots)) <= bytes_of(value):
                _repeat(copy, chain, value, env, env[reader])
    return copy


def _repeat(
    copy: fx.Graph,
    chain: Chain,
    value: fx.Node,
    env: Mapping[fx.Node, fx.Node],
    reader: fx.Node,
) -> None:
    made: dict[fx.Node, fx.Node] = {}
    with copy.inserting_before(reader):
        for node in chain.nodes:
            made[node] = copy.node_copy(node, lambda n: made.get(n, env[n]))
    for user in list(env[value].users):
        if user.op != "output" and _is_backward(user):
            user.replace_input_with(env[value], made[value])


def _is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


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
    value: Any = node.meta.get("val")
    if node.op == "get_attr" and value is None:
        value = getattr(node.graph.owning_module, str(node.target), None)
    is_number = isinstance(value, Tensor) and value.dim() == 0
    return isinstance(value, Tensor) and (is_number or not value.dtype.is_floating_point)
