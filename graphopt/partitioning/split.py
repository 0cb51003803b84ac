"""One forward and one backward half per stage, cut out of a joint graph.

Every half is a module whose arguments and results have names: inputs and outputs of the step, what
neighbours send, and what the forward saves for the backward. A value that is only relayed is an
argument and a result of the halves between. Parameters are arguments of both halves, so that a
schedule may give them different versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import getitem
from typing import cast

import torch
from torch import fx

from graphopt.analysis.effects import writes
from graphopt.partitioning.place import Placement
from graphopt.partitioning.route import Crossing, Place, Routes
from graphopt.plan import Phase, Signature


class Kind(StrEnum):
    """What an argument or a result of a half is.

    ``STEP``: an input or output of the whole step, by its position in the signature.
    ``RECEIVED`` and ``SENT``: between neighbouring stages. ``SAVED``: from the forward of a stage
    to its backward. ``PARTIAL``: a stage's share of a gradient that is added up between stages.
    ``KEPT``: from the gradients of a stage's input to those of its parameters.
    """

    STEP = "step"
    RECEIVED = "received"
    SENT = "sent"
    SAVED = "saved"
    PARTIAL = "partial"
    KEPT = "kept"


@dataclass(frozen=True)
class Port:
    """One argument or result.

    Attributes:
        kind: what it is.
        name: of its node in the joint graph.
        position: in the inputs or outputs of the signature; -1 where it is none of the step's.
    """

    kind: Kind
    name: str
    position: int = -1


@dataclass(frozen=True, eq=False)
class Half:
    """One half of a stage, or a part of one.

    Attributes:
        module: takes the arguments in the order of `inputs`, returns a tuple.
        inputs: its arguments.
        outputs: its results.
    """

    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True, eq=False)
class Split:
    """A step in stages.

    Attributes:
        signature: of the whole step.
        forward: a half per stage.
        backward: a half per stage.
        sums: adds up gradients from several stages: from ``PARTIAL`` to ``STEP``; None where no
            parameter needs it.
        crossings: what travels.
    """

    signature: Signature
    forward: tuple[Half, ...]
    backward: tuple[Half, ...]
    sums: Half | None
    crossings: tuple[Crossing, ...]


def split(module: fx.GraphModule, signature: Signature, placement: Placement) -> Split:
    """Cut a joint graph into the halves of its stages.

    Args:
        module: the graph; it is not changed.
        signature: of its inputs and outputs.
        placement: the stage of its nodes (`graphopt.partitioning.place.place`).
    """
    routes = Routes(module, signature, placement)
    halves = {
        phase: tuple(_half(module, routes, (s, phase)) for s in range(placement.stages))
        for phase in Phase
    }
    sums = _sums(module, routes) if routes.sums else None
    return Split(signature, halves[Phase.FORWARD], halves[Phase.BACKWARD], sums, routes.crossings)


def _half(module: fx.GraphModule, routes: Routes, place: Place) -> Half:
    stage, phase = place
    ahead = 1 if phase is Phase.FORWARD else 0  # activations come over the cut before
    results = list(_results(routes, place))
    for crossing in routes.crossings:
        if crossing.phase is phase and crossing.crosses(stage - 1 + ahead):
            results.append((Port(Kind.SENT, crossing.node.name), crossing.node))
    arguments: dict[fx.Node, Port] = {}
    given = routes.needs[place].step | {n for _, n in results if routes.home(n) == place}
    for position, node in enumerate(routes.slots):
        if node in given:
            arguments[node] = Port(Kind.STEP, node.name, position)
    if phase is Phase.BACKWARD:
        arguments |= {n: Port(Kind.SAVED, n.name) for n in _saved(routes, stage)}
    for crossing in routes.crossings:
        if crossing.phase is phase and crossing.crosses(stage - ahead):
            arguments[crossing.node] = Port(Kind.RECEIVED, crossing.node.name)
    inside = (n for n in routes.nodes if n.op == "call_function" and n not in routes.sums)
    own = [n for n in inside if routes.home(n) == place]
    return cut_out(module, arguments, own, results, lambda n: routes.made_again(n, place))


def _results(routes: Routes, place: Place) -> Iterator[tuple[Port, fx.Node]]:
    """What a half gives to the step, and to its own backward."""
    stage, phase = place
    for position in routes.needs[place].results:
        node = routes.returned[position][1]
        yield Port(Kind.STEP, node.name, position), node
    if phase is Phase.FORWARD:
        yield from ((Port(Kind.SAVED, n.name), n) for n in _saved(routes, stage))
    else:
        own = (n for n, s in routes.partials.items() if s == stage)
        yield from ((Port(Kind.PARTIAL, n.name), n) for n in own)


def _saved(routes: Routes, stage: int) -> list[fx.Node]:
    """What the backward of a stage has from its forward, in the order of the graph."""
    wanted = {
        n
        for n in routes.needs[stage, Phase.BACKWARD].foreign
        if (home := routes.home(n)) and home[1] is Phase.FORWARD and home[0] <= stage
    }
    for crossing in routes.crossings:
        home = routes.home(crossing.node)
        if crossing.phase is Phase.BACKWARD and home == (stage, Phase.FORWARD):
            wanted.add(crossing.node)
    return [n for n in routes.nodes if n in wanted]


def _sums(module: fx.GraphModule, routes: Routes) -> Half:
    arguments = {n: Port(Kind.PARTIAL, n.name) for n in routes.partials}
    results = [
        (Port(Kind.STEP, node.name, i), node)
        for i, (_, node) in enumerate(routes.returned)
        if node in routes.sums
    ]
    return cut_out(module, arguments, [n for n in routes.nodes if n in routes.sums], results)


def cut_out(
    module: fx.GraphModule,
    arguments: Mapping[fx.Node, Port],
    nodes: Iterable[fx.Node],
    results: Sequence[tuple[Port, fx.Node]],
    again: Callable[[fx.Node], bool] = lambda _: False,
) -> Half:
    """A half of some nodes of a graph.

    Args:
        module: the graph.
        arguments: nodes that are given.
        nodes: what it computes, in order.
        results: what it returns.
        again: whether a node that is neither given nor its own may be computed here, too.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    own = dict.fromkeys(nodes)
    for node in arguments:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)

    def copy(node: fx.Node) -> fx.Node:
        if node not in made:
            assert node in own or node.op == "get_attr" or again(node), f"{node} is not here"
            for operand in node.all_input_nodes:
                copy(operand)
            made[node] = graph.node_copy(node, made.__getitem__)
        return made[node]

    for node in own:
        copy(node)
    graph.output(tuple(copy(node) for _, node in results))
    half = fx.GraphModule(module, graph)
    return Half(half, tuple(arguments.values()), tuple(port for port, _ in results))


def in_two(backward: Half) -> tuple[Half, Half]:
    """A backward half as what the stage before waits for, and the rest.

    The first part computes what is sent; the second what remains, which are mostly gradients of
    parameters. A convolution's backward becomes two, one of each. Where an operator writes in
    place, all is in the first part.
    """
    module = fx.GraphModule(backward.module, _convolutions_in_two(backward.module.graph))
    graph = module.graph
    given = dict(zip(graph.find_nodes(op="placeholder"), backward.inputs, strict=True))
    returned = cast("Sequence[fx.Node]", graph.output_node().args[0])
    results = list(zip(backward.outputs, returned, strict=True))
    inside = [n for n in graph.nodes if n.op == "call_function"]
    sent = [(port, n) for port, n in results if port.kind is Kind.SENT]
    late = [(port, n) for port, n in results if port.kind is not Kind.SENT]
    first = _ancestors(inside if any(map(writes, inside)) else [n for _, n in sent])
    first |= {n for n in inside if n.target is getitem and n.args[0] in first}
    rest = [n for n in inside if n not in first]
    read = {o for n in rest for o in n.all_input_nodes} | {n for _, n in late}
    kept = [(Port(Kind.KEPT, n.name), n) for n in inside if n in first and n in read]
    early = {o for n in first for o in n.all_input_nodes} | {n for _, n in sent}
    head = {n: port for n, port in given.items() if n in early}
    tail = {n: port for n, port in given.items() if n in read} | {n: port for port, n in kept}
    return (
        cut_out(module, head, [n for n in inside if n in first], [*sent, *kept]),
        cut_out(module, tail, rest, late),
    )


def _convolutions_in_two(graph: fx.Graph) -> fx.Graph:
    """A copy in which no operator gives gradients of a convolution's input and of its weights."""
    copy = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = copy.node_copy(node, made.__getitem__)
    for node in list(copy.nodes):
        mask = node.args[-1] if node.target is torch.ops.aten.convolution_backward.default else ()
        if not (mask and mask[0] and any(mask[1:])):
            continue
        with copy.inserting_after(node):
            late = copy.node_copy(node)
        node.args = (*node.args[:-1], [True, False, False])
        late.args = (*late.args[:-1], [False, *mask[1:]])
        for user in list(node.users):
            if user.target is getitem and user.args[1] != 0:
                user.replace_input_with(node, late)
    return copy


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These operators and all that they depend on."""
    found: set[fx.Node] = set()
    wanted = list(nodes)
    while wanted:
        node = wanted.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            wanted += node.all_input_nodes
    return found
