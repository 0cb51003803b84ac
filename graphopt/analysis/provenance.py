"""Where one parameter or node of a graph comes from, and what uses it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphopt.analysis.aliasing import storage
from graphopt.analysis.cost import cost
from graphopt.analysis.dependency import backward_before, backward_operators
from graphopt.analysis.liveness import liveness
from graphopt.analysis.summary import describe
from graphopt.graph import (
    Graph,
    module_of,
    module_stack,
    operator_name,
    phase_of,
    source_of,
    value_of,
)
from graphopt.plan import Role


@dataclass(frozen=True)
class Neighbour:
    """A node that reads or produces the value of another one.

    Attributes:
        node: its name.
        operator: what it calls; its role, for an input.
        phase: the half of the step that it belongs to.
        source: the user's source line, where known.
    """

    node: str
    operator: str
    phase: str
    source: str


@dataclass(frozen=True)
class Gradient:
    """Where the gradient of a parameter comes from.

    Attributes:
        node: the node that produces it.
        operator: what that node calls.
        position: its place among the backward operators, from 1; 0 if forward computes it.
        needs: backward operators that must have run before it in any order.
        of: number of backward operators.
    """

    node: str
    operator: str
    position: int
    needs: int
    of: int


@dataclass(frozen=True)
class Provenance:
    """One parameter, buffer, input or operator.

    Attributes:
        name: what was asked for.
        what: its role, or ``"operator"``.
        node: the name of its node.
        operator: what it calls; empty for an input.
        phase: the half of the step that it belongs to.
        type: dtype and shape.
        module: qualified name of its module.
        kind: class of that module, where known.
        source: the user's source line, where known.
        producers: what it reads.
        users: what reads it, through views.
        outputs: the outputs of the graph that it is.
        flops: floating-point operations of its own.
        bytes: bytes it reads and writes.
        saved: bytes it keeps for backward.
        gradient: of a parameter or input that has one.
    """

    name: str
    what: str
    node: str
    operator: str
    phase: str
    type: str
    module: str
    kind: str
    source: str
    producers: tuple[Neighbour, ...]
    users: tuple[Neighbour, ...]
    outputs: tuple[str, ...]
    flops: int
    bytes: int
    saved: int
    gradient: Gradient | None


def names(graph: Graph) -> dict[str, fx.Node]:
    """What `provenance` can be asked for: inputs and nodes; an input's name wins."""
    result = {node.name: node for node in graph.nodes if node.op != "output"}
    slots = zip(graph.signature.inputs, graph.inputs, strict=True)
    return result | {slot.name: node for slot, node in slots if slot.role is not Role.TANGENT}


def provenance(graph: Graph, name: str) -> Provenance:
    """What `graph` says about `name`; raises ``KeyError`` for a name that `names` lacks."""
    node = names(graph)[name]
    slot = graph.slot(node) if node.op == "placeholder" else None
    users = _users(graph, node)
    gradient = _gradient(graph, slot.name) if slot else None
    source = source_of(node) or next((u.source for u in users if u.source), "")
    stack = module_stack(node)
    price = graph.get(cost).by_node[node]
    outputs = zip(graph.signature.outputs, graph.outputs, strict=True)
    return Provenance(
        name=name,
        what=str(slot.role) if slot else "operator",
        node=node.name,
        operator="" if slot else operator_name(node),
        phase=str(slot.phase if slot else phase_of(node)),
        type=describe(value_of(node)),
        module=slot.name.rpartition(".")[0] if slot else module_of(node),
        kind=stack[-1][1] if stack else "",
        source=source,
        producers=tuple(_neighbour(graph, producer) for producer in node.all_input_nodes),
        users=users,
        outputs=tuple(str(out) for out, returned in outputs if returned is node),
        flops=price.flops,
        bytes=price.bytes,
        saved=graph.get(liveness).saved.get(node, 0),
        gradient=gradient,
    )


def _users(graph: Graph, node: fx.Node) -> tuple[Neighbour, ...]:
    """What reads a value, in graph order; a view stands for its own users."""
    views = graph.get(storage).views
    found: set[fx.Node] = set()
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user in views:
            todo.extend(user.users)
        elif user.op != "output":
            found.add(user)
    return tuple(_neighbour(graph, user) for user in sorted(found))


def _neighbour(graph: Graph, node: fx.Node) -> Neighbour:
    what = str(graph.slot(node).role) if node.op == "placeholder" else operator_name(node)
    return Neighbour(node.name, what, str(phase_of(node)), source_of(node))


def _gradient(graph: Graph, name: str) -> Gradient | None:
    if name not in graph.signature.names(Role.GRAD):
        return None
    node = graph.gradient(name)
    backward = graph.get(backward_operators)
    made = node.all_input_nodes[0] if operator_name(node) == "getitem" else node
    return Gradient(
        node=node.name,
        operator=operator_name(_origin(graph, node)),
        position=backward.index(made) + 1 if made in backward else 0,
        needs=backward_before(graph, made),
        of=len(backward),
    )


def _origin(graph: Graph, node: fx.Node) -> fx.Node:
    """The operator that computed a value, behind views and ``getitem``."""
    owner = graph.get(storage).owner[node]
    return owner.all_input_nodes[0] if operator_name(owner) == "getitem" else owner
