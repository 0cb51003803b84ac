"""Gradients that become ready in other orders on each rank: no deadlock, and the right means."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rank_orders import REORDERED, STEPS, generated, run_cases
from tests.support.ranks import on_ranks


def _cases(rank: int, world: int, seeds: range) -> None:
    found = run_cases(rank, world, seeds, drawn=True)
    assert found["steps"] == STEPS * len(seeds)
    assert found["models with several messages"] > 0
    # Rank 0 draws the orders; those with other operators than it keep theirs.
    assert rank > 0 or found[REORDERED] == len(seeds)
    assert found["steps with gradients that only some ranks have"] > 0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("world", "seeds"), [(2, range(2, 7)), (3, range(7, 10))])
def test_no_deadlock_and_the_right_means(tmp_path: Path, world: int, seeds: range) -> None:
    on_ranks(tmp_path, world, _cases, world, seeds, timeout=200)


def test_cases_differ_where_they_should() -> None:
    cases = [generated(seed, 3) for seed in range(30)]
    assert cases[7] == generated(7, 3)
    orders = [len({rank.order for rank in case.ranks}) for case in cases]
    assert sum(count == 3 for count in orders) > 10
    assert any(len({rank.steps for rank in case.ranks}) > 1 for case in cases)
    assert any(len({rank.other for rank in case.ranks}) > 1 for case in cases)
    for case in cases:
        for steps in zip(*(rank.steps for rank in case.ranks), strict=True):
            # All ranks make the same number of backward passes.
            assert len({len(step.used) for step in steps}) == 1
