"""The heuristics keep their own promises, and never beat the proven optimum."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.baselines import baselines, blocks, chain
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Problem
from tests.support.partitions import random_problem

COSTS = st.lists(st.integers(1, 50), min_size=4, max_size=30)


def _sums(costs: list[int], lengths: list[int]) -> list[int]:
    result, first = [], 0
    for length in lengths:
        result.append(sum(costs[first : first + length]))
        first += length
    return result


@given(COSTS, st.integers(1, 4))
@settings(deadline=None)
def test_blocks_cover_the_sequence(costs: list[int], count: int) -> None:
    lengths = blocks([float(c) for c in costs], count)
    assert sum(lengths) == len(costs)
    assert len(lengths) == count
    assert min(lengths) > 0
    if min(lengths) > 1 and min(costs) < max(costs):
        # Costs count from the smallest one, and blocks differ by at most the largest.
        sums = _sums([c - min(costs) for c in costs], lengths)
        assert max(sums) - min(sums) <= max(costs) - min(costs)


def test_equal_costs_make_equal_blocks() -> None:
    assert blocks([1.0] * 12, 4) == [3, 3, 3, 3]


def test_a_known_case_in_which_blocks_are_not_the_best() -> None:
    """Shifted to [0, 1], the four small costs are nothing, so they stay where they are."""
    costs = [1, 1, 1, 1, 4, 4]
    assert _sums(costs, blocks([float(c) for c in costs], 3)) == [2, 6, 4]
    assert _sums(costs, chain(6, 3, lambda a, b: float(sum(costs[a:b])))) == [4, 4, 4]


@given(COSTS, st.integers(1, 4))
@settings(deadline=None)
def test_chain_is_optimal(costs: list[int], count: int) -> None:
    """Against the smallest limit under which filling blocks greedily takes at most `count`."""

    def needed(limit: int) -> float:
        blocks, held = 1, 0
        for c in costs:
            if c > limit:
                return math.inf
            blocks, held = (blocks + 1, c) if held + c > limit else (blocks, held + c)
        return blocks

    best = next(limit for limit in range(sum(costs) + 1) if needed(limit) <= count)
    lengths = chain(len(costs), count, lambda a, b: float(sum(costs[a:b])))
    assert max(_sums(costs, lengths)) == best


@given(st.builds(random_problem, st.integers(0, 10_000), st.integers(4, 9)), st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_baseline_beats_the_optimum(problem: Problem, overlap: bool) -> None:
    if len(atoms_of(problem)) < 3:
        return
    objective = Objective(overlap=overlap)
    best = plan(problem, 3, objective).value
    for name, partition in baselines(problem, 3, objective).items():
        assert partition.method == name
        assert partition.value >= best * (1 - 1e-9)
