"""Partitions ranked by simulation: none of them is missed, and the first is the fastest."""

from __future__ import annotations

import itertools

import pytest

from graphopt.errors import ArgumentError
from graphopt.partitioning.objective import Memory, Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Link, Operator, Parameter, Problem, Value
from graphopt.schedules.generate import generate
from graphopt.simulate.candidates import by_simulation
from graphopt.simulate.pipeline import costs_of, simulate_pipeline


def _chain(forward: list[float], backward: list[float], sizes: list[int]) -> Problem:
    """Operators in a row, of which the first and the last share a parameter."""
    last = len(forward) - 1
    operators = tuple(
        Operator(f"o{i}", f, b, parameters=("w",) if i in (0, last) else ())
        for i, (f, b) in enumerate(zip(forward, backward, strict=True))
    )
    values = tuple(
        Value(f"v{i}", f"o{i}", (f"o{i + 1}",), size, size) for i, size in enumerate(sizes)
    )
    return Problem(operators, values, (Parameter("w", 2),), link=Link(0.5, 0.0))


PROBLEM = _chain([1, 5, 1, 1, 4, 2], [6, 1, 3, 3, 1, 2], [3, 1, 4, 1, 5])


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "zero_bubble"])
@pytest.mark.parametrize("overlap", [True, False])
def test_ranking(kind: str, overlap: bool) -> None:
    schedule = generate(kind, 3, 6)
    found = by_simulation(PROBLEM, schedule, overlap=overlap)
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    assignments = [tuple(c.partition.assignment.items()) for c in found]
    assert len(set(assignments)) == len(found) > 1
    for candidate in found:
        stages, transfers = costs_of(candidate.partition)
        trace = simulate_pipeline(schedule, stages, transfers, overlap=overlap)
        # The shared gradient goes there and back, half a second per byte.
        assert candidate.seconds == trace.step + 2.0
    for objective in (Objective("minmax", 6, overlap), Objective("gpipe", 6, overlap)):
        assert tuple(plan(PROBLEM, 3, objective).assignment.items()) in assignments


def test_the_best_of_gpipe_is_among_them() -> None:
    """Forwards and backwards of GPipe are separate flows, which one objective models exactly."""
    schedule = generate("gpipe", 2, 50)
    best = by_simulation(PROBLEM, schedule)[0].trace.step
    every = []
    for cut in range(1, 6):
        partition = plan(_pinned(cut), 2, Objective("gpipe", 50), bound_seconds=0.0)
        every.append(simulate_pipeline(schedule, *costs_of(partition)).step)
    assert best <= min(every) * 1.01


def _pinned(cut: int) -> Problem:
    """The same problem with only one place to cut at."""
    names = [o.name for o in PROBLEM.operators]
    groups = tuple(
        frozenset(pair) for i, pair in enumerate(itertools.pairwise(names), 1) if i != cut
    )
    return Problem(PROBLEM.operators, PROBLEM.values, PROBLEM.parameters, groups, PROBLEM.link)


def test_no_room() -> None:
    with pytest.raises(ArgumentError) as caught:
        by_simulation(PROBLEM, generate("1f1b", 2, 4), memory=Memory(1.0))
    assert "fits into memory" in caught.value.message
