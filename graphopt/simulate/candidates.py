"""Partitions that are best for one objective or another, ranked by simulating a schedule.

No closed form knows a whole schedule with unequal stages: the objectives of the exact search are
models of it. What they find is simulated, and the fastest is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.partitioning.objective import OBJECTIVES, Memory, Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Problem
from graphopt.partitioning.result import Partition
from graphopt.schedules.actions import Schedule
from graphopt.simulate.pipeline import PipelineTrace, costs_of, simulate_pipeline


@dataclass(frozen=True)
class Candidate:
    """One partition under a schedule.

    Attributes:
        objective: what it is best for.
        partition: the stages.
        trace: what the simulated schedule does with them.
        seconds: of the step, with the reductions of shared gradients behind it.
    """

    objective: Objective
    partition: Partition
    trace: PipelineTrace
    seconds: float


def by_simulation(
    problem: Problem,
    schedule: Schedule,
    *,
    overlap: bool = True,
    memory: Memory | None = None,
    objectives: Sequence[Objective] = (),
) -> list[Candidate]:
    """Different partitions, the fastest first; the first objective wins a tie.

    Args:
        problem: what is cut, into as many stages as the schedule has.
        schedule: what is simulated.
        overlap: whether transfers run beside the computation.
        memory: what a stage may hold; of a kind of schedule that holds as much as this one.
        objectives: which to try; by default all kinds, with transfers overlapped and not.

    Raises:
        ArgumentError: no partition fits into memory, or there are too few operators.
    """
    given = objectives or [
        Objective(kind, schedule.micro_batches, beside, memory or Memory())
        for beside in (overlap, not overlap)
        for kind in OBJECTIVES
    ]
    found: dict[tuple[int, ...], Candidate] = {}
    for objective in given:
        partition = plan(problem, schedule.stages, objective, bound_seconds=0.0)
        key = tuple(partition.assignment[o.name] for o in problem.operators)
        if key not in found:
            found[key] = _candidate(partition, schedule, objective, overlap)
    return sorted(found.values(), key=lambda c: c.seconds)


def _candidate(
    partition: Partition, schedule: Schedule, objective: Objective, overlap: bool
) -> Candidate:
    stages, transfers = costs_of(partition)
    trace = simulate_pipeline(schedule, stages, transfers, overlap=overlap)
    reductions = [0.0] * len(stages)
    for shared in partition.shared:
        for stage in shared.stages:
            reductions[stage] += shared.seconds
    return Candidate(objective, partition, trace, trace.step + max(reductions))
