"""The part of fold_inference that marks what has to be computed only once per set of weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import fx

import graphopt.ops  # noqa: F401  (registers graphopt::frozen)
from graphopt.analysis.constants import cone, is_cheap
from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.sharing import REASONS, Seen, Sharing
from graphopt.graph import Graph, value_of
from graphopt.passbase import Applied, Declined, Number, Outcome
from graphopt.plan import Slot
from graphopt.rewrite import emit

FROZEN = torch.ops.graphopt.frozen.default

FREE_BYTES = 1 << 20
"""A frozen value may be larger than all weights that it comes from, up to this size."""


def freeze(
    graph: Graph,
    weights: Mapping[fx.Node, Slot],
    known: Collection[fx.Node],
    mutated: Collection[fx.Node],
) -> Outcome:
    """Put ``graphopt.frozen`` on each maximal expression of weights that takes computing.

    Views stay in the graph and read the frozen value.

    Args:
        graph: an inference graph.
        weights: parameters and buffers that the graph leaves alone.
        known: nodes that depend only on those.
        mutated: nodes that would belong to `known`, did the graph not change a weight of theirs.
    """
    sharing = Sharing(graph)
    declined: list[Declined] = []
    inside = {*known, *mutated}
    marked = graph.fx.find_nodes(op="call_function", target=FROZEN)
    upstream = {*weights, *known, *marked}
    chosen: dict[fx.Node, list[fx.Node]] = {}
    for node in [n for n in reversed(graph.nodes) if n in inside]:
        if all(user in inside or user.target is FROZEN for user in node.users):
            continue
        within = cone(node, upstream)
        sources = [n for n in weights if n in within]
        is_candidate = (sources or node in mutated) and not is_cheap(node, sharing)
        reason = _obstacle(node, sources, mutated, sharing) if is_candidate else ""
        if is_candidate and not reason:
            chosen[node] = sources
            continue
        inside.remove(node)  # stays an operator, whose operands may be frozen
        # One word about a whole expression of a mutated buffer is enough.
        if reason and not (reason == "mutated" and any(user in mutated for user in node.users)):
            declined.append(Declined(node.name, reason, _DETAILS[reason], _numbers(node)))
    applied: list[Applied] = []
    for node, sources in reversed(chosen.items()):
        _mark(graph, node, [user for user in node.users if user not in inside])
        largest = max(sources, key=lambda n: tensor_bytes(value_of(n)))
        applied.append(Applied(weights[largest].name, "computed once", _numbers(node)))
    return Outcome(tuple(applied), tuple(declined))


def _mark(graph: Graph, node: fx.Node, readers: list[fx.Node]) -> None:
    with graph.fx.inserting_after(node):
        frozen = emit(graph, FROZEN, node, like=node)
    for reader in readers:
        reader.replace_input_with(node, frozen)


_DETAILS = {
    "mutated": "the graph changes a parameter or buffer that it depends on",
    "escapes": "each call returns a new tensor; " + REASONS["escapes"],
    "too-large": "it is larger than the weights that it comes from",
}


def _obstacle(
    node: fx.Node, sources: list[fx.Node], mutated: Collection[fx.Node], sharing: Sharing
) -> str:
    if node in mutated:
        return "mutated"
    if sharing.seen(node) & (Seen.RETURNED | Seen.STORED):
        return "escapes"
    allowed = sum(tensor_bytes(value_of(n)) for n in sources)
    size = tensor_bytes(value_of(node))
    return "too-large" if size > max(allowed, FREE_BYTES) else ""


def _numbers(node: fx.Node) -> dict[str, Number]:
    return {"bytes": tensor_bytes(value_of(node))}
