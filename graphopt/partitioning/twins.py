"""Which forward operator each backward node differentiates.

Autograd numbers forward nodes and their backward alike. A number is believed only if gradients
then flow from later operators to earlier ones: the sum of two gradients carries the number of
whatever was recorded last. Such a node goes with the node that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from graphopt.analysis.aliasing import storage
from graphopt.graph import Graph, module_of, phase_of
from graphopt.partitioning.forward_side import ForwardSide, is_size
from graphopt.plan import Phase, Role


def twins(graph: Graph, side: ForwardSide) -> dict[fx.Node, int]:
    """The operator of each backward node, in graph order."""
    backward = [n for n in graph.operators if phase_of(n) is Phase.BACKWARD and not is_size(n)]
    numbered: dict[int, list[tuple[str, int]]] = {}
    for node, index in side.host.items():
        number = node.meta.get("seq_nr")
        if number is not None:
            numbered.setdefault(number, []).append((module_of(node), index))
    ancestors = side.ancestors()
    twin: dict[fx.Node, int] = {}
    for node in backward:
        found = _numbered(node, numbered)
        if found is None:
            continue
        producers = [twin[p] for p in node.all_input_nodes if p in twin]
        if all(ancestors[p] >> found & 1 for p in producers):
            twin[node] = found
    for node in reversed(backward):
        if node not in twin:
            readers = [twin[user] for user in node.users if user in twin]
            if readers:
                twin[node] = max(readers)
    for node in backward:
        if node not in twin:
            twin[node] = _by_operands(node, side, twin)
    return {node: twin[node] for node in backward}


def weight_side(graph: Graph, twin: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Backward nodes whose result no backward of another operator waits for.

    They lead to gradients of their operator's own parameters. The sum of gradients of a parameter
    that several operators use counts as one of them.
    """
    parameters = set(graph.signature.names(Role.PARAM))
    views = graph.get(storage).views
    weights: set[fx.Node] = set()
    other: set[fx.Node] = set()
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        weight = slot.role is Role.GRAD and slot.name in parameters
        (weights if weight else other).add(node)
    result: set[fx.Node] = set()
    sums: set[fx.Node] = set()  # with the views behind them
    for node in reversed(list(twin)):
        users = [user for user in node.users if user.op != "output"]
        if node in other or not (users or node in weights):
            continue
        if all(u in result and (twin[u] == twin[node] or u in sums) for u in users):
            result.add(node)
            adds = node in views or node.target is torch.ops.aten.add.Tensor
            if adds and all(u in sums for u in users):
                sums.add(node)
    return result


def _numbered(node: fx.Node, numbered: dict[int, list[tuple[str, int]]]) -> int | None:
    candidates = numbered.get(node.meta.get("seq_nr", -1), [])
    module = module_of(node)
    same = [index for other, index in candidates if other == module]
    return next(iter(same or [index for _, index in candidates]), None)


def _by_operands(node: fx.Node, side: ForwardSide, twin: dict[fx.Node, int]) -> int:
    """The earliest producer's, else the latest operator it reads from, else the last one."""
    producers = [twin[p] for p in node.all_input_nodes if p in twin]
    if producers:
        return min(producers)
    read = [side.host[p] for p in node.all_input_nodes if p in side.host]
    return max(read, default=len(side.nodes) - 1)
