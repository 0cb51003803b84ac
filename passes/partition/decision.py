"""Which stages are taken: the best ones, and for all sizes of batches the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace

from graphopt.errors import ArgumentError
from graphopt.partitioning.evaluate import evaluate
from graphopt.partitioning.objective import Memory, Objective
from graphopt.partitioning.problem import Problem
from graphopt.partitioning.result import Certificate, Partition
from graphopt.passbase import PassContext
from graphopt.schedules.actions import Schedule
from graphopt.simulate.candidates import by_simulation


def decided(
    problem: Problem, objective: Objective, search: Callable[[], Partition], ctx: PassContext
) -> Partition:
    """The best stages; in a job those that were chosen when this graph first had another size.

    A parameter must not change its rank because a last batch is smaller.

    Args:
        problem: what is cut.
        objective: in whose terms stages that were decided elsewhere are described.
        search: finds the best stages.
        ctx: knows the ranks of a running job.
    """
    ranks = ctx.ranks.get("pp")
    if ranks is None:
        return search()
    searched: list[Partition] = []

    def decide() -> str:
        try:
            searched.append(search())
        except ArgumentError:  # all ranks raise it, below
            return "null"
        return json.dumps(searched[0].assignment)

    structure = [(o.name, o.parameters) for o in problem.operators]
    key = hashlib.sha256(json.dumps(structure).encode()).hexdigest()
    assignment = json.loads(ranks.agree("stages", key, decide))
    if searched:
        return searched[0]
    if assignment is None:
        return search()
    found = evaluate(problem, assignment, objective, method="as on rank 0, or for another size")
    try:
        own = search()
    except ArgumentError:  # no stages of this size fit, which is for the memory check to say
        return found
    return replace(found, value=own.value, certificate=own.certificate)


def simulated(problem: Problem, schedule: Schedule, memory: Memory) -> Partition:
    """Of the stages that are best for one objective or another, those with the shortest step.

    The value is what the simulated step takes. No step is shorter than its computation spread
    evenly over all ranks.
    """
    best = by_simulation(problem, schedule, memory=memory)[0]
    work = math.fsum(s.seconds for s in best.partition.stages)
    lower = schedule.micro_batches * work / len(schedule.ranks)
    certificate = Certificate(best.seconds, min(lower, best.seconds), "computation spread evenly")
    return replace(best.partition, value=best.seconds, certificate=certificate)


def sharing_together(problem: Problem) -> Problem:
    """With operators that share a trained parameter in one stage.

    It is updated there alone, or its gradient changed by something that only that stage knows.
    """
    groups = (names for names in _users(problem).values() if len(names) > 1)
    return replace(problem, together=(*problem.together, *map(frozenset, groups)))


def shared_names(problem: Problem) -> list[str]:
    """Trained parameters that several operators read."""
    return [name for name, users in _users(problem).items() if len(users) > 1]


def _users(problem: Problem) -> dict[str, list[str]]:
    trained = {p.name for p in problem.parameters if p.trained}
    users: dict[str, list[str]] = {}
    for operator in problem.operators:
        for name in operator.parameters:
            if name in trained:
                users.setdefault(name, []).append(operator.name)
    return users
