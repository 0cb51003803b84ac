"""From operators in stages to a stage for every node, backward nodes included.

Gradients only flow to the same stage or to earlier ones. So a backward node stands in the stage of
its forward twin, or in the earliest one that computes an operand of it. A sum of gradients stands
where its operands are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.analysis.aliasing import Storage, storage
from graphopt.analysis.hints import hints
from graphopt.graph import Graph, phase_of, value_of
from graphopt.partitioning.forward_side import ForwardSide, is_size
from graphopt.partitioning.twins import twins
from graphopt.plan import Phase, Role


@dataclass(frozen=True)
class Placement:
    """Where each node of a step runs.

    Attributes:
        stages: how many there are.
        stage: of operators by name. Those that are missing only view inputs of the step: whoever
            reads them makes them again.
        sums: names of nodes, in order, that add up gradients of one parameter from several stages.
            They run once per step, when all micro-batches are done.
    """

    stages: int
    stage: Mapping[str, int]
    sums: tuple[str, ...] = ()


def place(graph: Graph, assignment: Mapping[str, int]) -> Placement:
    """The stage of every node.

    Args:
        graph: a joint graph.
        assignment: stage by name of the operators of `graphopt.partitioning.from_graph`; one that
            `graphopt.partitioning.evaluate.check` accepts.
    """
    side = ForwardSide(graph)
    memory = graph.get(storage)
    stage = {node: assignment[side.nodes[i][0].name] for node, i in side.host.items()}
    count = max(assignment.values()) + 1
    backward = {n: assignment[side.nodes[i][0].name] for n, i in twins(graph, side).items()}
    stage |= _summed_early(_pulled(backward, memory), count - 1, memory)
    sums = _sums(graph, stage, memory)
    names = {n.name: s for n, s in stage.items() if n not in sums}
    return Placement(count, names, tuple(n.name for n in graph.operators if n in sums))


def floating(node: fx.Node, memory: Storage) -> bool:
    """Whether a node is a view of what is in several stages anyway, or a number made of sizes.

    That is a view of an input of the step, and in backward also one of a value of the forward.
    """
    if is_size(node):
        return True
    if node not in memory.views:
        return False
    owner = memory.owner[node]
    if owner.op == "placeholder" or owner.op == "get_attr":
        return True
    return phase_of(node) is Phase.BACKWARD and phase_of(owner) is Phase.FORWARD


def _pulled(stage: Mapping[fx.Node, int], memory: Storage) -> dict[fx.Node, int]:
    """Stages in which all operands are there: each node as early as the earliest of them.

    Views, and the pieces of a result, are where their memory is; what writes into it, too.
    """
    root: dict[fx.Node, fx.Node] = {}
    for node in stage:
        root[node] = node
        if not floating(node, memory) and node.all_input_nodes:
            source = node.all_input_nodes[0] if node in memory.views else memory.owner[node]
            root[node] = root.get(source, node)
    found = dict(stage)
    for node in stage:
        if node not in memory.views:
            found[root[node]] = min(found[root[node]], stage[node])
    moved = True
    while moved:
        moved = False
        for node in stage:
            operands = [p for p in node.all_input_nodes if p in found and not floating(p, memory)]
            least = min([found[root[node]], *(found[root[p]] for p in operands)])
            if least < found[root[node]]:
                found[root[node]], moved = least, True
    return {node: found[root[node]] for node in stage}


def _summed_early(stage: dict[fx.Node, int], last: int, memory: Storage) -> dict[fx.Node, int]:
    """With gradients added up in the last stage that has both, so that their sum travels.

    Autograd adds up the gradients of a value where it goes on to the one who made the value.
    """
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in stage:
        family.setdefault(memory.owner[node], []).append(node)
    for node in stage:
        own = family.get(node, [])
        if not _adds(node) or not memory.views.issuperset(n for n in own if n is not node):
            continue
        operands = [memory.owner[p] if floating(p, memory) else p for p in node.all_input_nodes]
        if all(phase_of(p) is Phase.BACKWARD for p in operands):
            # A tangent comes in the last stage.
            latest = min(stage.get(p, last) for p in operands)
            stage |= {n: max(stage[n], latest) for n in own}
    return stage


def _sums(graph: Graph, stage: Mapping[fx.Node, int], memory: Storage) -> frozenset[fx.Node]:
    """Nodes that do nothing but add up one parameter's gradient, from more than one stage."""
    parameters = set(graph.signature.names(Role.PARAM))
    returned: dict[fx.Node, list[bool]] = {}
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        own = slot.role is Role.GRAD and slot.name in parameters
        returned.setdefault(node, []).append(own)
    adding: set[fx.Node] = set()
    for node in reversed(list(stage)):
        if not (_adds(node) or _views(node, memory)):
            continue
        if any(phase_of(n) is Phase.FORWARD or n not in stage for n in _with_operands(node)):
            continue
        inside = [user in adding for user in node.users if user.op != "output"]
        results = returned.get(node, [])
        if (inside or results) and all(inside) and all(results):
            adding.add(node)
    spread: dict[fx.Node, set[int]] = {}
    for node in stage:
        if node in adding:
            spread[node] = set().union(*(spread.get(p, {stage[p]}) for p in node.all_input_nodes))
    return frozenset(node for node, stages in spread.items() if len(stages) > 1)


def _adds(node: fx.Node) -> bool:
    """Whether it adds two tensors of its own shape and type."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    values = [value_of(n) if isinstance(n, fx.Node) else None for n in (*node.args, node)]
    tensors = [v for v in values if isinstance(v, Tensor)]
    # No symbol is 1, so sizes that are equal in one call are equal in all.
    return len(tensors) == 3 and len({(hints(t.shape), t.dtype) for t in tensors}) == 1


def _with_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    return node, *node.all_input_nodes


def _views(node: fx.Node, memory: Storage) -> bool:
    value = value_of(node)
    return node in memory.views and isinstance(value, Tensor) and len(node.all_input_nodes) == 1
