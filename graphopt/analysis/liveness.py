"""How long values live: activations saved for backward, and peak memory.

Memory belongs to the node that allocated it (`graphopt.analysis.aliasing`), so a view keeps its
whole base alive and takes no memory itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.analysis.aliasing import Storage, storage
from graphopt.analysis.cost import tensor_bytes
from graphopt.graph import Graph, phase_of, value_of
from graphopt.plan import Phase

_RECOMPUTED = frozenset({CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE})


@dataclass(frozen=True)
class Liveness:
    """How long the values of a graph live.

    Attributes:
        saved: bytes of each forward value that backward reads. What a checkpointed region
            recomputes is replaced by what it is recomputed from. The model's inputs, parameters and
            buffers do not count: they are alive anyway. An upper bound, since a backend may choose
            to recompute more.
        peak: largest number of bytes alive at once, besides the inputs of the graph, when the nodes
            run in order, nothing is fused and nothing is recomputed.
        peak_at: the node during which that happens; None in a graph without operators.
    """

    saved: Mapping[fx.Node, int]
    peak: int
    peak_at: fx.Node | None

    @property
    def saved_bytes(self) -> int:
        """Bytes kept from forward to backward."""
        return sum(self.saved.values())


def liveness(graph: Graph) -> Liveness:
    """Liveness of `graph` in its present order."""
    memory = graph.get(storage)
    peak, peak_at = _peak(graph, memory)
    return Liveness(_saved(graph, memory), peak, peak_at)


def alive(graph: Graph) -> tuple[tuple[fx.Node, int], ...]:
    """Bytes alive while each operator runs, besides the inputs of the graph, in order."""
    held = _alive(graph, graph.get(storage))
    return tuple((node, size) for node, size in held if node.op == "call_function")


def _saved(graph: Graph, memory: Storage) -> dict[fx.Node, int]:
    wanted = [
        source
        for node in graph.operators
        if phase_of(node) is Phase.BACKWARD
        for source in node.all_input_nodes
        if phase_of(source) is Phase.FORWARD
    ]
    seen: set[fx.Node] = set()
    kept: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.meta.get("recompute") in _RECOMPUTED:
            wanted.extend(node.all_input_nodes)
        else:
            kept.add(memory.owner[node])
    return {n: _owned_bytes(n) for n in graph.operators if n in kept}


def _peak(graph: Graph, memory: Storage) -> tuple[int, fx.Node | None]:
    peak, peak_at = 0, None
    for node, alive in _alive(graph, memory):
        if alive > peak:
            peak, peak_at = alive, node
    return peak, peak_at


def _alive(graph: Graph, memory: Storage) -> Iterator[tuple[fx.Node, int]]:
    """Bytes while each node runs."""
    nodes = graph.nodes
    last_use = {
        memory.owner[source]: node for node in nodes for source in (*node.all_input_nodes, node)
    }
    dies: dict[fx.Node, list[fx.Node]] = {}
    for owner, node in last_use.items():
        if owner.op == "call_function":
            dies.setdefault(node, []).append(owner)
    alive = 0
    for node in nodes:
        if node.op == "call_function" and memory.owner[node] is node:
            alive += _owned_bytes(node)
        yield node, alive
        alive -= sum(_owned_bytes(owner) for owner in dies.get(node, ()))


def _owned_bytes(node: fx.Node) -> int:
    """Bytes that a node allocates; a tuple's members belong to their ``getitem`` nodes."""
    value = value_of(node)
    return 0 if isinstance(value, tuple | list) else tensor_bytes(value)
