"""The search finds the optimum: against brute force, a mixed-integer program, and itself."""

from __future__ import annotations

import itertools
import math

import pytest

from graphopt.errors import ArgumentError
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.bounds import bounds_of
from graphopt.partitioning.downsets import downsets
from graphopt.partitioning.dynamic import Search
from graphopt.partitioning.milp import solve_milp
from graphopt.partitioning.objective import MINMAX, OBJECTIVES, Memory, Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Problem
from graphopt.partitioning.space import Space
from graphopt.schedules.laws import KINDS
from tests.support.partitions import brute_force, random_problem


def _value(problem: Problem, stages: int, objective: Objective) -> float:
    try:
        return plan(problem, stages, objective).value
    except ArgumentError as error:
        if "fits into memory" in error.message or "more than the" in error.message:
            return math.inf
        raise


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("overlap", [True, False])
def test_equals_brute_force(kind: str, overlap: bool) -> None:
    for seed in range(24):
        problem = random_problem(seed, 5 + seed % 3)
        for stages in (1, 2, 3):
            objective = Objective(kind, 1 + seed % 5, overlap)
            assert _value(problem, stages, objective) == pytest.approx(
                brute_force(problem, stages, objective), rel=1e-9
            ), (seed, stages)


@pytest.mark.parametrize("schedule", KINDS)
def test_equals_brute_force_with_limits_of_memory(schedule: str) -> None:
    outcomes = set()
    for seed, limit in itertools.product(range(12), (25, 60, 120)):
        problem = random_problem(100 + seed, 6)
        memory = Memory(limit, schedule, state=float(seed % 3), stash=seed % 2 == 0)
        for kind in OBJECTIVES:
            objective = Objective(kind, 4, overlap=seed % 2 == 0, memory=memory)
            best = brute_force(problem, 3, objective)
            outcomes.add(math.isinf(best))
            assert _value(problem, 3, objective) == pytest.approx(best, rel=1e-9), (seed, limit)
    assert outcomes == {True, False}


def test_equals_brute_force_of_eight_operators_and_a_limit_per_stage() -> None:
    for seed in range(4):
        problem = random_problem(200 + seed, 8)
        objective = Objective(MINMAX, 4, False, Memory((90.0, 70.0, 50.0)))
        assert _value(problem, 3, objective) == pytest.approx(
            brute_force(problem, 3, objective), rel=1e-9
        )


def test_equals_a_mixed_integer_program_on_200_graphs() -> None:
    for seed in range(200):
        problem = random_problem(1000 + seed, 8)
        stages, overlap = 2 + seed % 3, seed // 3 % 2 == 0
        objective = Objective(MINMAX, 4, overlap)
        solved = solve_milp(atoms_of(problem), stages, problem.link, objective)
        assert _value(problem, stages, objective) == pytest.approx(solved.value, rel=1e-6), seed
        assert solved.lower <= solved.value * (1 + 1e-6)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_program_solves_every_objective_with_memory(kind: str) -> None:
    for seed in range(8):
        problem = random_problem(300 + seed, 8)
        memory = Memory(110.0 if seed % 2 else math.inf)
        objective = Objective(kind, 3, seed % 4 < 2, memory)
        solved = solve_milp(atoms_of(problem), 3, problem.link, objective)
        assert _value(problem, 3, objective) == pytest.approx(solved.value, rel=1e-6)
        assert solved.infeasible == math.isinf(solved.value)


def test_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    problem = random_problem(3, 10)
    solve_milp(atoms_of(problem), 3, problem.link, Objective())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("score", ["whole", "backward", "latency", "excess"])
def test_row_by_row_equals_all_at_once(score: str) -> None:
    """Spaces too large to keep all stages take another way to the same result."""
    for seed in range(10):
        problem = random_problem(400 + seed, 12)
        objective = Objective(MINMAX, 4, seed % 2 == 0, Memory(150.0))
        atoms = atoms_of(problem)
        masks = downsets(atoms)
        assert masks is not None
        space = Space(atoms, masks, problem.link, objective, limited=True)
        one = Search(space, 3, kept=0).best(score)  # type: ignore[arg-type]
        other = Search(space, 3).best(score)  # type: ignore[arg-type]
        assert (one is None) == (other is None)
        assert one is None or one.score == other.score


def test_lower_bounds_hold() -> None:
    for seed in range(20):
        problem = random_problem(500 + seed, 6)
        for kind, overlap in itertools.product(OBJECTIVES, (True, False)):
            objective = Objective(kind, 4, overlap)
            bound = bounds_of(atoms_of(problem), 2).of(objective)
            assert bound <= brute_force(problem, 2, objective) + 1e-9
