"""Which stages are taken: the best ones, and for all sizes of batches the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from graphopt.errors import ArgumentError
from graphopt.partitioning.evaluate import evaluate
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Problem
from graphopt.partitioning.result import Partition
from graphopt.passbase import PassContext


def decided(problem: Problem, stages: int, objective: Objective, ctx: PassContext) -> Partition:
    """The best stages; in a job those that were chosen when this graph first had another size.

    A parameter must not change its rank because a last batch is smaller. The bound of its
    certificate is only known where a partition is searched for.

    Args:
        problem: what is cut.
        stages: how many.
        objective: what is minimised.
        ctx: knows the ranks of a running job.
    """
    ranks = ctx.ranks.get("pp")
    if ranks is None:
        return plan(problem, stages, objective)
    searched: list[Partition] = []

    def decide() -> str:
        try:
            searched.append(plan(problem, stages, objective))
        except ArgumentError:  # all ranks raise it, below
            return "null"
        return json.dumps(searched[0].assignment)

    structure = [(o.name, o.parameters) for o in problem.operators]
    key = hashlib.sha256(json.dumps([structure, stages]).encode()).hexdigest()
    assignment = json.loads(ranks.agree("stages", key, decide))
    if searched:
        return searched[0]
    if assignment is None:
        return plan(problem, stages, objective)
    found = evaluate(problem, assignment, objective, method="as on rank 0, or for another size")
    try:
        own = plan(problem, stages, objective)
    except ArgumentError:  # no stages of this size fit, which is for the memory check to say
        return found
    return replace(found, certificate=own.certificate)


def sharing_together(problem: Problem) -> Problem:
    """With operators that share a trained parameter in one stage.

    It is updated there alone, or its gradient changed by something that only that stage knows.
    """
    trained = {p.name for p in problem.parameters if p.trained}
    users: dict[str, list[str]] = {}
    for operator in problem.operators:
        for name in trained.intersection(operator.parameters):
            users.setdefault(name, []).append(operator.name)
    groups = tuple(frozenset(names) for names in users.values() if len(names) > 1)
    return replace(problem, together=(*problem.together, *groups))
