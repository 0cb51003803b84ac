"""Which tangents each gradient depends on."""

from __future__ import annotations

from torch import fx

from graphopt.graph import Graph
from graphopt.plan import Role


def gradient_sources(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """For each ``GRAD`` output, in order, the positions of the tangents that reach it.

    A reduced gradient counts as the rank's own: what else its message carries does not matter.
    Eager leaves ``.grad`` alone where no tangent arrives; the runtime needs this to do the same. A
    gradient that is a constant, as that of an empty tensor is, arrives with any of them.
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
    every = frozenset(range(len(tangents)))
    outputs = list(zip(graph.signature.outputs, graph.outputs, strict=True))
    local = {slot.name: node for slot, node in outputs if slot.role is Role.LOCAL}
    return tuple(
        tuple(sorted(reach[local.get(slot.name, node)] or every))
        for slot, node in outputs
        if slot.role is Role.GRAD
    )
