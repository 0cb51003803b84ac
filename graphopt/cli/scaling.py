"""What `graphopt simulate` predicts, and from which assumptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.cli.data_parallel import gradients_of

if TYPE_CHECKING:
    from graphopt.cli.compute import Compute
    from graphopt.graph import Graph
    from graphopt.network.clusters import Cluster
    from graphopt.network.curve import Curve
    from graphopt.network.negotiation import Negotiator
    from graphopt.plan.grouping import Group
    from graphopt.simulate import Point, Timeline


@dataclass(frozen=True)
class Assumed:
    """What the predictions rest on.

    Attributes:
        machine: where messages travel.
        compute: what each rank computes with.
        straggler: standard deviation of a rank's compute time, as a share of it.
        contention: by which factor compute is slower while a message travels.
        algorithm: one of `graphopt.network.clusters.ALGORITHMS`, or ``"auto"``.
        negotiator: how ranks agree on a group before they reduce it.
    """

    machine: Cluster
    compute: Compute
    straggler: float
    contention: float
    algorithm: str
    negotiator: Negotiator

    def all_reduce(self, world: int) -> Curve:
        """Seconds of one all-reduce over `world` ranks by its bytes."""
        return self.machine.all_reduce(world, self.algorithm)

    def negotiation(self, gradients: int) -> Callable[[int], Callable[[Group], float]] | None:
        """Seconds in which so many ranks agree on a group of some of that many gradients."""
        if self.negotiator.name == "none":
            return None

        def of(world: int) -> Callable[[Group], float]:
            link = self.machine.hop(world)
            return lambda group: self.negotiator.seconds(world, len(group.names), gradients, link)

        return of

    def words(self, timeline: Timeline, world: int) -> list[tuple[str, str]]:
        """All assumptions for a reader, by topic."""
        from graphopt.render.units import duration, size

        machine = self.machine
        volume = size(sum(g.bytes for g in timeline.ready))
        talk = self.negotiator.words()
        slower = f"{self.contention:g} times as slow" if self.contention > 1 else "no slower"
        return [
            ("compute", self.compute.words()),
            (
                "step",
                f"forward {duration(timeline.forward)}, backward {duration(timeline.backward)}, "
                f"{len(timeline.ready)} gradients, {volume}; each rank computes the same batch",
            ),
            (
                "link",
                f"{self.all_reduce(world).source}; assumed: {', '.join(machine.assumed)}",
            ),
            *([("negotiation", f"{talk}; the groups are planned without it")] if talk else []),
            (
                "straggler",
                f"compute times of ranks spread by {100 * self.straggler:.3g} % (assumed), and "
                "all wait for the slowest",
            ),
            ("contention", f"compute is {slower} while a message travels"),
            ("DDP", "default buckets, 1 MiB and then 25 MiB, with the same ready times and link"),
        ]


def timeline_of(graph: Graph, compute: Compute, name: str) -> Timeline:
    """When one rank computes what.

    Raises:
        ArgumentError: no gradient has to be reduced.
    """
    from graphopt.analysis.gradient_order import measured_order
    from graphopt.graph import phase_of
    from graphopt.plan import Phase
    from graphopt.simulate import Timeline

    # The graph was captured on a stand-in for the machine, so its own device does not count.
    seconds = compute.seconds(graph)
    order = gradients_of(graph, name, lambda joint: measured_order(joint, seconds))
    forward = math.fsum(s for node, s in seconds.items() if phase_of(node) is Phase.FORWARD)
    return Timeline(forward, order.backward, order.ready)


def predict(
    timeline: Timeline, assumed: Assumed, worlds: Sequence[int]
) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """One step per machine size: with the plan's groups, and with DDP's default ones."""
    from functools import cache

    from graphopt.grouping.baselines import ddp_default
    from graphopt.grouping.planner import plan
    from graphopt.network.straggler import delay
    from graphopt.simulate import scaling

    ready = timeline.ready
    buckets = ddp_default(ready)
    all_reduce = cache(assumed.all_reduce)
    sigma = assumed.straggler * timeline.compute
    ours, ddp = (
        scaling(
            timeline,
            groups,
            all_reduce,
            worlds,
            delay=lambda world: delay(world, sigma),
            contention=assumed.contention,
            negotiation=assumed.negotiation(len(ready)),
        )
        for groups in (
            lambda world, cost: plan(ready, cost, timeline.backward, world=world).groups,
            lambda world, cost: buckets,
        )
    )
    return ours, ddp
