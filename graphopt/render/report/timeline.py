"""The time lines of a report: one rank's step with its messages, and the stages of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.analysis.liveness import alive
from graphopt.graph import Graph, module_of, operator_name, phase_of
from graphopt.plan import Phase
from graphopt.render.report.document import Activity, TimeLine

if TYPE_CHECKING:
    from graphopt.network.curve import Curve
    from graphopt.plan.grouping import Grouping

Seconds = Mapping[fx.Node, float]
COMPUTE = "compute"
BYTES = "bytes alive"


@dataclass(frozen=True)
class Link:
    """Where the messages of data-parallel ranks travel.

    Attributes:
        world: number of ranks.
        curve: seconds of one all-reduce over its bytes.
        grouping: which gradients are reduced together.
    """

    world: int
    curve: Curve
    grouping: Grouping


def step_line(
    graph: Graph, seconds: Seconds, assumed: Sequence[tuple[str, str]], link: Link | None
) -> TimeLine:
    """One rank's step: what it computes, module by module, and its messages beside it.

    Args:
        graph: runs in its order, one operator at a time.
        seconds: of each operator.
        assumed: what they rest on.
        link: of a job; ``None`` for a rank alone.
    """
    computed = tuple(_computed(graph, seconds))
    messages = tuple(_messages(graph, seconds, link)) if link else ()
    lanes = dict.fromkeys(one.lane for one in (*computed, *messages))
    title = "One step" if link is None else f"One step of {link.world} ranks"
    words = (*assumed, ("messages", link.curve.source)) if link else tuple(assumed)
    return TimeLine(
        title, words, tuple(lanes), (*computed, *messages), {BYTES: memory_points(graph, seconds)}
    )


def memory_points(graph: Graph, seconds: Seconds) -> tuple[tuple[float, float], ...]:
    """Bytes alive after each operator that takes time."""
    clock, points = 0.0, [(0.0, 0.0)]
    for node, held in alive(graph):
        points.append((clock, float(held)))
        clock += seconds.get(node, 0.0)
    return tuple(_steps([*points, (clock, points[-1][1])]))


def pipeline_line(data: Mapping[str, Any]) -> TimeLine:
    """The simulated schedule of a plan's stages.

    Args:
        data: the plan part of the pass that makes stages.
    """
    from graphopt.simulate.pipeline import planned_pipeline

    trace = planned_pipeline(data)
    spans = tuple(
        Activity(span.lane, _kind(span.lane, span.name), span.name, span.start, span.end)
        for span in trace.spans
    )
    held = {f"bytes of rank {rank}": steps for rank, steps in enumerate(trace.memory)}
    assumed = (
        ("schedule", f"{data['schedule']}, {data['micro_batches']} micro-batches"),
        ("times", str(data["times"])),
        ("link", str(data["link"])),
        ("bubble", f"{100 * trace.bubble:.3g} % of the ranks' time"),
    )
    return TimeLine(f"{len(data['stages'])} stages", assumed, trace.lanes, spans, held)


def _computed(graph: Graph, seconds: Seconds) -> Iterator[Activity]:
    """Neighbouring operators of one module and one half, as one activity."""
    clock = 0.0
    timed = (node for node in graph.operators if seconds.get(node, 0.0) > 0)
    for (module, phase), nodes in groupby(timed, lambda n: (module_of(n), phase_of(n))):
        members = list(nodes)
        spent = math.fsum(seconds[node] for node in members)
        kind = "backward" if phase is Phase.BACKWARD else "forward"
        name = module or operator_name(members[0])
        yield Activity(COMPUTE, kind, name, clock, clock + spent)
        clock += spent


def _messages(graph: Graph, seconds: Seconds, link: Link) -> Iterator[Activity]:
    from graphopt.analysis.gradient_order import measured_order
    from graphopt.simulate import Timeline, simulate

    order = measured_order(graph, seconds)
    forward = math.fsum(seconds[n] for n in graph.operators if phase_of(n) is Phase.FORWARD)
    trace = simulate(
        Timeline(forward, order.backward, order.ready), link.grouping.groups, link.curve
    )
    for span in trace.spans:
        if span.lane != COMPUTE:
            yield Activity(span.lane, "message", span.name, span.start, span.end)


def _kind(lane: str, name: str) -> str:
    if lane.startswith("link"):
        return "transfer"
    from graphopt.schedules.actions import Action, Kind

    names = {Kind.F: "forward", Kind.UPDATE: "update"}
    return names.get(Action.parse(name).kind, "backward")


def _steps(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Without points at which nothing changes."""
    for index, (when, value) in enumerate(points):
        last = index == len(points) - 1
        if index == 0 or last or value != points[index - 1][1] or value != points[index + 1][1]:
            yield when, value
