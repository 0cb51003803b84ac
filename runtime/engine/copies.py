"""Saved values that are copies of smaller ones, or masks made of numbers that are known anyway.

Attention with fewer keys than queries is captured as a copy of each key per query, and its causal
mask as numbers for every pair of positions; a partitioner saves both for the backward, where eager
keeps the keys as they are, and no mask. The backward copies the keys, and makes the mask, anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from graphopt.analysis.aliasing import storage_of
from graphopt.analysis.remade import Chain, bytes_of, chain_of
from graphopt.runtime.engine.halves import Halves, copy_graph


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
    for value in sorted(saved, key=bytes_of, reverse=True):
        held = outputs | {owner[v] for v in given if v is not value}
        chain = chain_of(value, given)
        if owner[value] in held or chain is None:
            continue
        fresh = {owner[root] for root in chain.roots} - held
        if not 2 * sum(map(bytes_of, fresh)) <= bytes_of(owner[value]):
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


def _repeat(
    graph: fx.Graph,
    argument: fx.Node,
    chain: Chain,
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
        forward=_LazyGraphModule(halves.forward, forward),
        backward=_LazyGraphModule(halves.backward, backward),
        sources=tuple(sources),
    )
