"""The interval rule of SP-NGD against tables made by hand."""

from __future__ import annotations

import pytest
import torch

from graphopt.plan.kfac import DIAGONAL
from graphopt.runtime.kfac.interval import Interval, next_interval, similar
from graphopt.runtime.kfac.packing import pack
from tests.kfac.curvature_problems import moment


def _always_similar(steps: int) -> tuple[list[int], list[int]]:
    """Refreshes and intervals of a statistic that never changes."""
    state, refreshes, intervals = Interval(), [], []
    for step in range(steps):
        if state.due(step):
            # The first refresh has nothing to be compared with, the second one value only.
            state = state.refreshed(step, len(refreshes) > 0, len(refreshes) > 1)
            refreshes.append(step)
            intervals.append(state.last)
    return refreshes, intervals


def test_intervals_of_a_constant_statistic_are_the_fibonacci_numbers() -> None:
    refreshes, intervals = _always_similar(10_000)
    assert intervals[:8] == [1, 1, 2, 3, 5, 8, 13, 21]
    assert refreshes[:8] == [0, 1, 2, 4, 7, 12, 20, 33]
    assert len(refreshes) == 19


@pytest.mark.parametrize(
    ("to_last", "to_before", "last", "before", "expected"),
    [
        (False, False, 8, 5, 4),
        (False, True, 5, 3, 2),
        (False, False, 1, 1, 1),
        (True, False, 8, 5, 8),
        (True, True, 8, 5, 13),
        (True, True, 4, 8, 12),
    ],
)
def test_one_step_of_the_rule(
    to_last: bool, to_before: bool, last: int, before: int, expected: int
) -> None:
    assert next_interval(to_last, to_before, last, before) == expected


def test_a_table_with_changes() -> None:
    state, table = Interval(), []
    for to_last, to_before in [
        *((False, False), (True, False), (True, True), (True, True), (True, True)),
        *((False, True), (True, False), (True, True), (False, False), (False, False)),
    ]:
        state = state.refreshed(state.next, to_last, to_before)
        table.append((state.last, state.before, state.next))
    assert table == [
        *((1, 1, 1), (1, 1, 2), (2, 1, 4), (3, 2, 7), (5, 3, 12)),
        *((2, 5, 14), (2, 2, 16), (4, 2, 20), (2, 4, 22), (1, 2, 23)),
    ]


def test_a_missed_step_is_made_up_for() -> None:
    state = Interval(last=3, before=2, next=7)
    assert not state.due(6)
    assert state.due(9)
    assert state.refreshed(9, True, True).next == 14


def test_similarity_counts_both_triangles() -> None:
    old = torch.eye(3)[None]
    off_diagonal = old.clone()
    off_diagonal[0, 1, 0] = off_diagonal[0, 0, 1] = 0.13
    # Full: 0.13 * sqrt(2) / sqrt(3) = 0.106; the packed numbers alone would give 0.075.
    assert not similar(pack(off_diagonal), pack(old))
    assert similar(pack(off_diagonal), pack(old), alpha=0.11)


def test_similarity_of_diagonals_is_their_plain_norm() -> None:
    old = torch.tensor([[3.0, 0.0, 4.0]])
    assert similar(old + torch.tensor([[0.0, 0.49, 0.0]]), old, form=DIAGONAL)
    assert not similar(old + torch.tensor([[0.0, 0.51, 0.0]]), old, form=DIAGONAL)


def test_the_bound_itself_is_not_similar() -> None:
    old = torch.tensor([[4.0]])
    assert not similar(torch.tensor([[5.0]]), old, alpha=0.25)
    assert similar(torch.tensor([[4.99]]), old, alpha=0.25)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_similar_to_zero_none_or_what_is_not_finite(bad: float) -> None:
    some = pack(moment(1, 2))
    broken = torch.full_like(some, bad)
    zero = torch.zeros_like(some)
    assert similar(some, some)
    for new, old in ((some, None), (zero, zero), (some, zero), (broken, some), (some, broken)):
        assert not similar(new, old)
