"""Packing, intervals and solvers of curvature on generated input."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.plan.kfac import DIAGONAL
from graphopt.runtime.kfac.factored import Factored
from graphopt.runtime.kfac.interval import Interval, similar
from graphopt.runtime.kfac.lowrank import LowRank, leading_pairs, woodbury
from graphopt.runtime.kfac.packing import frobenius, pack, unpack
from graphopt.runtime.kfac.solve import Problem
from graphopt.runtime.kfac.unitwise import solve as solve_norm

QUICK = settings(max_examples=60, deadline=None)
DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 2**32 - 1)


def _random(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@QUICK
@given(SEEDS, st.integers(1, 4), st.integers(1, 12), DTYPES)
def test_packing_round_trip_and_norm(seed: int, blocks: int, size: int, dtype: torch.dtype) -> None:
    half = _random(seed, blocks, size, size).to(dtype)
    full = half + half.mT
    packed = pack(full)
    assert packed.shape == (blocks, size * (size + 1) // 2)
    assert torch.equal(unpack(packed), full)
    assert torch.equal(pack(unpack(packed)), packed)
    rows, columns = torch.tril_indices(size, size)
    assert torch.equal(packed, full[:, rows, columns])
    torch.testing.assert_close(frobenius(packed), torch.linalg.norm(full.double()))


def _refreshes(values: list[float], alpha: float) -> list[int]:
    """The rule word by word, on one statistic of one number per step, without the state machine."""
    seen: list[tuple[int, float]] = []
    intervals = [1, 1]
    due = 0
    for step, value in enumerate(values):
        if step != due:
            continue

        def is_near(age: int, value: float = value) -> bool:
            old = seen[-age][1] if len(seen) >= age else math.nan
            return old != 0 and abs(value - old) / abs(old) < alpha

        if not is_near(1):
            chosen = max(1, math.floor(intervals[-1] / 2))
        elif not is_near(2):
            chosen = intervals[-1]
        else:
            chosen = intervals[-1] + intervals[-2]
        intervals.append(chosen)
        seen.append((step, value))
        due = step + chosen
    return [step for step, _ in seen]


@QUICK
@given(
    st.lists(st.sampled_from([0.0, 1.0, 1.05, 1.2, 2.0]), min_size=1, max_size=8),
    st.lists(st.integers(1, 40), min_size=8, max_size=8),
)
def test_intervals_follow_the_rule(levels: list[float], lengths: list[int]) -> None:
    values = [v for v, n in zip(levels, lengths, strict=False) for _ in range(n)]
    state, found, former = Interval(), [], []
    for step, value in enumerate(values):
        assert state.last >= 1
        assert state.before >= 1
        if state.due(step):
            new = torch.tensor([[value]], dtype=torch.float64)
            last, before = (former[-age] if len(former) >= age else None for age in (1, 2))
            near = [bool(similar(new, old, 0.1, DIAGONAL)) for old in (last, before)]
            state = state.refreshed(step, *near)
            found.append(step)
            former.append(new)
            assert state.next > step
    assert found == _refreshes(values, 0.1)


@QUICK
@given(SEEDS, st.integers(2, 24), st.integers(1, 24), st.integers(1, 8), st.floats(-6, 1), DTYPES)
def test_low_rank_inverse_is_positive_definite(
    seed: int, size: int, rows: int, rank: int, log_damping: float, dtype: torch.dtype
) -> None:
    data = _random(seed, 2, rows, size)
    matrices = (data.mT @ data / rows).to(dtype)
    damping = torch.tensor(10**log_damping, dtype=dtype)
    values, basis, rest = leading_pairs(matrices, min(rank, size))
    assert (values >= 0).all()
    assert (rest >= 0).all()
    made = woodbury((values, basis, rest), damping)
    middle = torch.diag_embed(made["weights"].double())
    inverse = basis.double() @ middle @ basis.double().mT
    inverse += made["scale"].double()[:, None, None] * torch.eye(size, dtype=torch.float64)
    # The least eigenvalue is that of the largest of the matrix, up to rounding against the largest.
    rounding = 100 * torch.finfo(dtype).eps * float(made["scale"].max())
    assert torch.linalg.eigvalsh(inverse).min() > -rounding
    if dtype is torch.float64:
        least = 1 / float(values.max() + damping)
        assert torch.linalg.eigvalsh(inverse).min() > least - rounding - 1e-6 * least


@QUICK
@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.floats(-4, 1), st.floats(-8, 8))
def test_scaling_the_sides_against_each_other(
    seed: int, rows: int, columns: int, log_damping: float, log_factor: float
) -> None:
    left, right = _random(seed, 1, 2 * rows, rows), _random(seed + 1, 1, 2 * columns, columns)
    left, right, factor = left.mT @ left, right.mT @ right, 10**log_factor
    some = _random(seed + 2, 1, rows, columns)
    for solver in (Factored(), LowRank(rank=1)):
        first, second = solver.solve(
            [Problem("a", left, right), Problem("b", left / factor, right * factor)],
            10**log_damping,
        )
        assert first is not None
        assert second is not None
        expected = solver.apply(first, some)
        difference = solver.apply(second, some) - expected
        assert difference.norm() <= 1e-8 * expected.norm()


@QUICK
@given(SEEDS, st.integers(1, 20), st.floats(-6, 3), st.floats(-3, 6), DTYPES)
def test_unit_wise_inverse_is_the_inverse(
    seed: int, channels: int, log_damping: float, log_scale: float, dtype: torch.dtype
) -> None:
    data = _random(seed, channels, 3, 2) * 10**log_scale
    blocks = (data.mT @ data).to(dtype)
    damping = 10**log_damping
    solution = solve_norm(pack(blocks), damping)
    assert solution is not None
    damped = blocks.double() + damping * torch.eye(2, dtype=torch.float64)
    expected = torch.linalg.inv(damped)
    found = unpack(solution["inverse"]).double()
    condition = torch.linalg.cond(damped).max().item()
    tolerance = 8 * (torch.finfo(dtype).eps + condition * torch.finfo(torch.float64).eps)
    assert ((found - expected).norm(dim=(1, 2)) <= tolerance * expected.norm(dim=(1, 2))).all()
