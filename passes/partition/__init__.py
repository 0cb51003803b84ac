"""Cut a training step into the stages of a pipeline, and say how good they provably are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import fx

from graphopt.analysis.profile import profile_graph
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.network.clusters import cluster
from graphopt.partitioning.from_graph import from_graph
from graphopt.partitioning.objective import Memory, Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Link
from graphopt.passbase import Applied, Declined, Outcome, Pass, PassContext
from graphopt.passes.partition.decision import decided, shared_names, sharing_together, simulated
from graphopt.passes.partition.describe import described
from graphopt.plan.partition import Stages
from graphopt.schedules.actions import Schedule
from graphopt.schedules.check import check
from graphopt.schedules.generate import scheduled
from graphopt.simulate.pipeline import Transfer, costs_of, simulate_pipeline

MICRO_BATCHES_PER_RANK = 4  # with that many the bubble is below a fifth (Huang et al. 2019)
CHUNKS = 2  # stages per rank of an interleaved schedule, by default


@dataclass(frozen=True)
class Partition(Pass):
    """Run training steps in the stages of a pipeline, chosen so that none is slower than need be.

    The stages are those whose slowest takes least time, found by an exact search over all ways to
    cut the graph; where there are too many of them, by a narrower one with a proven bound. The call
    that is captured counts as one micro-batch. A backward operator is in the stage of its forward
    one. Views, operators in place and buffers that change never straddle a cut, and operators that
    draw random numbers keep their order. The graph stays as it is: the plan says by name which
    operator runs where. The model gets a method ``step(*batch)``, which runs a training step, each
    rank its own stages.

    Attributes:
        stages: how many; by default the ranks of the mesh along ``pp``, and two per rank for the
            schedule ``interleaved``.
        schedule: ``gpipe``, ``1f1b``, ``zero_bubble``; ``interleaved`` with several stages per
            rank; ``no_flush``, which never drains the pipeline, so that gradients are late.
        microbatches: of one step; by default four per rank.
        objective: ``minmax``, the slowest stage or cut; ``alpa``, the length of a step whose stages
            wait for the slowest; ``gpipe``, the slowest forward plus the slowest backward;
            ``simulate``, the simulated step of the schedule, among the best stages of the others.
        memory: the most bytes that a stage may hold, by default any. Counted are activations in
            flight, weights, gradients, one optimizer state and kept versions of weights.
        cost: ``roofline`` assumes a device of the kind that the model is on, ``measure`` times each
            operator on this one.
        weights: where nothing is flushed, which weights a backward sees: ``stash``, those that its
            forward saw; ``inconsistent``, the current ones; ``predicted``, the current ones after a
            forward with those that the optimizer predicts.
        accumulate: micro-batches per update, where nothing is flushed.
        link: a machine of `graphopt.network.clusters`, whose messages between ranks are assumed.
    """

    name: ClassVar[str] = "partition"
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    provides: ClassVar[frozenset[str]] = frozenset({"staged"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"staged", "grouped"})
    communicates: ClassVar[frozenset[str]] = frozenset({"pp"})
    owns_step: ClassVar[bool] = True
    symbolic: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    source: ClassVar[str] = (
        "objectives of Narayanan et al. 2019, Zheng et al. 2022 and Tanaka et al. 2021; the search "
        "over downsets follows Tarnawski et al. 2021"
    )

    stages: int | None = None
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero_bubble", "no_flush"] = "1f1b"
    microbatches: int | None = None
    objective: Literal["minmax", "alpa", "gpipe", "simulate"] = "minmax"
    memory: float | None = None
    cost: Literal["roofline", "measure"] = "roofline"
    weights: Literal["stash", "inconsistent", "predicted"] = "stash"
    accumulate: int = 1
    link: str = "10gbe"

    def __post_init__(self) -> None:
        if self.schedule != "no_flush" and (self.weights != "stash" or self.accumulate != 1):
            raise ArgumentError(
                f"weights={self.weights} and accumulate={self.accumulate} are about pipelines that "
                f"are never drained, and the schedule is {self.schedule!r}",
                hint="leave them out, or ask for schedule=no_flush",
            )
        for option in ("stages", "microbatches", "memory", "accumulate"):
            value = getattr(self, option)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ArgumentError(
                    f"{option}={value:g} is not positive and finite",
                    hint=f"give a positive number, or leave {option} out",
                )

    def micro_batches(self, mesh: Mapping[str, int]) -> int:
        """As asked for, or four per rank."""
        return self.microbatches or MICRO_BATCHES_PER_RANK * self._sizes(mesh.get("pp", 1))[0]

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Choose stages; the graph is left as it is."""
        ranks, stages = self._sizes(ctx.size("pp"))
        if stages == 1:
            detail = "the mesh has one rank along pp and no number of stages is given"
            if self.stages == 1:
                detail = "one stage is the whole step"
            return Outcome(declined=(Declined("graph", "one-stage", detail),))
        batches = self.micro_batches({"pp": ranks})
        schedule = scheduled(self.schedule, stages, ranks, batches)
        hop = cluster(self.link).hop(ranks)
        problem = from_graph(
            graph,
            self._seconds(graph, ctx),
            device=ctx.device,
            link=Link(hop.per_byte, hop.latency),
        )
        if self.schedule == "no_flush" or "preconditioned" in graph.facts:
            problem = sharing_together(problem)
        objective = self._objective(batches)
        if self.objective == "simulate":
            search = partial(simulated, problem, schedule, objective.memory)
        else:
            search = partial(plan, problem, stages, objective)
        try:
            found = decided(problem, objective, search, ctx)
        except ArgumentError as error:
            if self.schedule == "no_flush" and (names := shared_names(problem)):
                error.hint = (
                    f"operators that share {names[0]!r} are kept together, since a pipeline that "
                    "is never drained updates it in one stage: untie it, or take a schedule that "
                    "flushes"
                )
            raise
        part = replace(
            _on_ranks(described(graph, problem, found), schedule),
            schedule=self.schedule,
            micro_batches=batches,
            ranks=ranks,
            objective=self.objective,
            link=self.link,
            limit=self.memory,
            weights=self.weights,
            accumulate=self.accumulate,
        )
        self._check_memory(part)
        transfers = [Transfer(cut.forward, cut.backward) for cut in part.cuts]
        trace = simulate_pipeline(schedule, costs_of(found)[0], transfers)
        part = replace(part, step=trace.step, bubble=trace.bubble)
        return Outcome(_applied(part), part=part)

    def _seconds(self, graph: Graph, ctx: PassContext) -> dict[fx.Node, float] | None:
        """Measured times, the first rank's for all."""
        if self.cost != "measure":
            return None
        ranks = ctx.ranks.get("pp")
        if ranks is None:
            return dict(profile_graph(graph))
        names = "\n".join(node.name for node in graph.operators)
        text = ranks.agree(
            "times of operators",
            names,
            lambda: json.dumps({n.name: t for n, t in profile_graph(graph).items()}),
        )
        times = json.loads(text)
        return {node: times[node.name] for node in graph.operators}

    def _sizes(self, pp: int) -> tuple[int, int]:
        """Ranks and stages."""
        if self.schedule != "interleaved":
            stages = self.stages or pp
            return pp if pp > 1 else stages, stages
        if pp == 1 and self.stages is not None and self.stages > 1:
            raise ArgumentError(
                "the schedule 'interleaved' needs to know how many ranks share the stages",
                where="mesh",
                hint=f"mesh='pp={max(2, self.stages // CHUNKS)}'",
            )
        return pp, self.stages or (CHUNKS * pp if pp > 1 else 1)

    def _objective(self, batches: int) -> Objective:
        """An interleaved schedule holds about as much as 1F1B; what it holds is checked behind."""
        kind = "1f1b" if self.schedule == "interleaved" else self.schedule
        shape = "minmax" if self.objective == "simulate" else self.objective
        limit = math.inf if self.memory is None else self.memory
        return Objective(shape, batches, memory=Memory(limit, kind))

    def _check_memory(self, part: Stages) -> None:
        for number, stage in enumerate(part.stages):
            if self.memory is not None and stage.memory > self.memory:
                raise ArgumentError(
                    f"stage {number} holds {stage.memory:,.0f} bytes under the schedule "
                    f"{self.schedule!r}, {stage.memory - self.memory:,.0f} more than its limit",
                    where=f"stage {number}: {', '.join(stage.modules)}",
                    hint="take more ranks, another schedule, or a higher limit",
                )


def _on_ranks(part: Stages, schedule: Schedule) -> Stages:
    """With the ranks of the stages, and with what the schedule itself has in flight."""
    held = check(schedule).in_flight
    return replace(
        part,
        stages=tuple(
            replace(
                stage,
                rank=schedule.placement[number],
                in_flight=held[number],
                memory=stage.memory + stage.saved * (held[number] - stage.in_flight),
            )
            for number, stage in enumerate(part.stages)
        ),
    )


def _applied(part: Stages) -> tuple[Applied, ...]:
    summary = Applied(
        "graph",
        f"cut into {len(part.stages)} stages",
        {
            "slowest_ms": round(1e3 * max(s.seconds for s in part.stages), 3),
            "step_ms": round(1e3 * part.step, 3),
            "bubble": round(part.bubble, 4),
            "above_bound": round(part.gap, 4) if math.isfinite(part.gap) else "unknown",
        },
    )
    stages = (
        Applied(
            f"{s.modules[0]} … {s.modules[-1]}" if len(s.modules) > 1 else s.modules[0],
            f"stage {number} on rank {s.rank}",
            {
                "operators": len(s.forward_nodes) + len(s.backward_nodes),
                "ms": round(1e3 * s.seconds, 3),
                "bytes": round(s.memory),
            },
        )
        for number, s in enumerate(part.stages)
    )
    shared = (
        Applied(s.name, f"in stages {', '.join(map(str, s.stages))}, its gradients are added up")
        for s in part.shared
    )
    return summary, *stages, *shared
