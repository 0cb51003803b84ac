"""One step on machines of many sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.errors import ArgumentError
from graphopt.plan.grouping import Group
from graphopt.simulate.step import Cost, Negotiation, simulate
from graphopt.simulate.timeline import Timeline
from graphopt.simulate.trace import Trace


@dataclass(frozen=True)
class Point:
    """One machine size.

    Attributes:
        world: number of ranks.
        efficiency: the step of one rank alone over the step of `world` ranks; in (0, 1].
        trace: the simulated step of the slowest rank.
        groups: number of collectives per step.
    """

    world: int
    efficiency: float
    trace: Trace
    groups: int

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return self.trace.step

    @property
    def exposed(self) -> float:
        """Seconds of communication that no computation hides."""
        return self.trace.exposed


def scaling(
    timeline: Timeline,
    groups: Callable[[int, Cost], Sequence[Group]],
    cost: Callable[[int], Cost],
    worlds: Sequence[int],
    *,
    delay: Callable[[int], float] | None = None,
    negotiation: Callable[[int], Negotiation] | None = None,
    channels: int = 1,
    contention: float = 1.0,
) -> tuple[Point, ...]:
    """Weak scaling: the work per rank does not depend on the number of ranks.

    A single rank neither communicates nor waits.

    Args:
        timeline: the computation of one rank alone.
        groups: what is reduced together, by number of ranks and cost of a message there.
        cost: the cost of a message by number of ranks.
        worlds: numbers of ranks.
        delay: by number of ranks, how many seconds longer than a typical rank the slowest one
            computes; None for ranks of equal speed.
        negotiation: what agreement costs, by number of ranks; None for a compiled plan.
        channels: as in `simulate`.
        contention: as in `simulate`.

    Raises:
        ArgumentError: a world is smaller than 1, the step takes no time, or as in `simulate`.
    """
    if timeline.compute <= 0:
        raise ArgumentError(
            "the efficiency of a step without computation is not defined", where="timeline"
        )
    points = []
    for world in worlds:
        if world < 1:
            raise ArgumentError(f"there is no world of {world} ranks", where="worlds")
        if world == 1:
            alone = Timeline(timeline.forward, timeline.backward, ())
            points.append(Point(1, 1.0, simulate(alone, (), lambda _: 0.0), 0))
            continue
        late = delay(world) if delay else 0.0
        if not (math.isfinite(late) and late >= 0):
            raise ArgumentError(f"the slowest of {world} ranks cannot be {late} s late")
        price = cost(world)
        chosen = groups(world, price)
        trace = simulate(
            timeline.stretched(1.0 + late / timeline.compute),
            chosen,
            price,
            channels=channels,
            contention=contention,
            negotiation=negotiation(world) if negotiation else None,
        )
        points.append(Point(world, timeline.compute / trace.step, trace, len(chosen)))
    return tuple(points)
