"""From a partition of the problem to the part of a plan: nodes, modules and what travels."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from graphopt.graph import Graph, module_of, phase_of
from graphopt.partitioning import result
from graphopt.partitioning.place import place
from graphopt.partitioning.problem import Link, Problem
from graphopt.partitioning.route import Routes
from graphopt.plan import Phase
from graphopt.plan.partition import Crossing, Cut, Shared, Stage, Stages


def described(graph: Graph, problem: Problem, found: result.Partition) -> Stages:
    """The plan part of a partition, without what its schedule adds.

    Args:
        graph: that was partitioned.
        problem: that was made of it.
        found: its stages, with a certificate.
    """
    placement = place(graph, found.assignment)
    routes = Routes(graph.module, graph.signature, placement)
    nodes = [n for n in graph.operators if n.name in placement.stage]
    names = _names((n, placement.stage[n.name]) for n in nodes if phase_of(n) is Phase.FORWARD)
    own = [[n for n in nodes if placement.stage[n.name] == s] for s in range(placement.stages)]
    certificate = found.certificate
    crossings = tuple(
        Crossing(
            name=c.node.name,
            module=module_of(c.node),
            made=c.made,
            read=c.read,
            relayed=c.relayed,
            bytes=c.bytes,
            back=c.phase is Phase.BACKWARD,
        )
        for c in routes.crossings
    )
    return Stages(
        schedule="",
        micro_batches=0,
        ranks=0,
        stages=tuple(
            _stage(stage, own[number], names[number]) for number, stage in enumerate(found.stages)
        ),
        crossings=crossings,
        cuts=tuple(_cut(crossings, cut, problem.link) for cut in range(placement.stages - 1)),
        shared=tuple(Shared(s.name, s.stages, s.seconds) for s in found.shared),
        sums=placement.sums,
        objective="",
        value=found.value,
        lower=certificate.lower if certificate else 0.0,
        proof=certificate.proof if certificate else "",
        times=problem.times,
        link="",
        limit=None,
        step=0.0,
        bubble=0.0,
    )


def _cut(crossings: Iterable[Crossing], cut: int, link: Link) -> Cut:
    """Seconds of all that really crosses; the search knew about the same before it was routed."""
    size = {False: 0, True: 0}
    for crossing in crossings:
        if crossing.crosses(cut):
            size[crossing.back] += crossing.bytes
    return Cut(link.seconds(size[False]), link.seconds(size[True]))


def _stage(stage: result.Stage, nodes: Iterable[fx.Node], names: tuple[str, ...]) -> Stage:
    by_phase: dict[Phase, list[str]] = {phase: [] for phase in Phase}
    for node in nodes:
        by_phase[phase_of(node)].append(node.name)
    return Stage(
        rank=0,
        modules=names,
        forward_nodes=tuple(by_phase[Phase.FORWARD]),
        backward_nodes=tuple(by_phase[Phase.BACKWARD]),
        parameters=stage.parameters,
        forward=stage.forward,
        input_grad=stage.input_grad,
        weight_grad=stage.weight_grad,
        saved=stage.saved,
        parameter_bytes=stage.parameter_bytes,
        in_flight=stage.in_flight,
        memory=stage.memory,
    )


def _names(nodes: Iterable[tuple[fx.Node, int]]) -> dict[int, tuple[str, ...]]:
    """The modules of each stage: the outermost ones that it has as a whole, and parts."""
    paths = [(module_of(node), stage) for node, stage in nodes]
    stages_of: dict[str, set[int]] = {}
    for path, stage in paths:
        for name in _outwards(path):
            stages_of.setdefault(name, set()).add(stage)
    found: dict[int, dict[str, None]] = {}
    for path, stage in paths:
        whole = (name for name in _outwards(path) if len(stages_of[name]) == 1)
        found.setdefault(stage, {})[next(whole, f"{path} (part)" if path else "")] = None
    return {
        stage: tuple(name for name in names if name) or ("(root)",)
        for stage, names in found.items()
    }


def _outwards(path: str) -> list[str]:
    """All modules around a path, the outermost first, the root left out."""
    words = path.split(".") if path else []
    return [".".join(words[: count + 1]) for count in range(len(words))]
