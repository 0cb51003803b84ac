"""Carry a choice of formats out: one cast per value and format."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt.graph import Graph, phase_of
from graphopt.passes.precision.problem import Problem
from graphopt.plan import Phase
from graphopt.rewrite import emit, result_of

_CAST = torch.ops.aten._to_copy.default


def lower(
    graph: Graph, problem: Problem, low: frozenset[fx.Node], dtype: torch.dtype
) -> list[fx.Node]:
    """Rewrite `graph` so that the units in `low` run in `dtype`; returns the casts.

    Inputs and outputs of the graph keep their types.
    """

    def lowers(user: fx.Node, value: fx.Node) -> bool:
        return user in low and value in problem.units[user].read

    casts = []
    for value, to_low in problem.casts(low):
        readers = [user for user in value.users if lowers(user, value) is to_low]
        cast = _insert(graph, value, dtype if to_low else torch.float32, readers)
        for user in readers:
            user.replace_input_with(value, cast)
        casts.append(cast)
    _recompute(graph, low)
    graph.changed()
    return casts


def _insert(graph: Graph, value: fx.Node, to: torch.dtype, readers: list[fx.Node]) -> fx.Node:
    """A cast right after its value, or before its first reader where none is in the same half."""
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    first = min(readers, key=order.__getitem__)
    reading = [node for node in readers if node.op != "output"]
    near = value.op != "placeholder" and (
        len(reading) < len(readers) or any(phase_of(n) is phase_of(value) for n in reading)
    )
    with graph.fx.inserting_after(value) if near else graph.fx.inserting_before(first):
        node = emit(graph, _CAST, value, dtype=to, like=value)
    if phase_of(value if near else first) is Phase.BACKWARD:
        node.meta["partitioner_tag"] = "is_backward"
    else:
        node.meta.pop("partitioner_tag", None)
    return node


def _recompute(graph: Graph, low: frozenset[fx.Node]) -> None:
    """Fake values of what is lowered, and of the casts after it."""
    changed: set[fx.Node] = set(low)
    for node in graph.operators:
        if node in changed or changed.intersection(node.all_input_nodes):
            node.meta["val"] = result_of(node)
            if node.target is operator.getitem:
                changed.add(node)
