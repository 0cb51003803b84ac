"""Which tangents each gradient depends on."""

from __future__ import annotations

from torch import fx

from graphopt.graph import Graph
from graphopt.plan import Role


def gradient_sources(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """For each ``GRAD`` output, in order, the positions of the tangents that reach it.

    Eager leaves ``.grad`` alone where no tangent arrives; the runtime needs this to do the same.
    """
    reach: dict[fx.Node, frozenset[int]] = {}
    tangents = [
        node
        for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True)
        if slot.role is Role.TANGENT
    ]
    for index, node in enumerate(tangents):
        reach[node] = frozenset({index})
    for node in graph.nodes:
        if node not in reach:
            reach[node] = frozenset().union(*(reach[n] for n in node.all_input_nodes))
    return tuple(
        tuple(sorted(reach[node]))
        for node, slot in zip(graph.outputs, graph.signature.outputs, strict=True)
        if slot.role is Role.GRAD
    )
