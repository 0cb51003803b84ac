"""Sums, multiples, transposes and shifts are within their bounds of dense ones."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings

from graphopt.errors import ArgumentError
from graphopt.hierarchical.arithmetic.algebra import add, scaled, shifted
from graphopt.hierarchical.blocks import Dense, Grid, LowRank, dense
from graphopt.hierarchical.clusters import by_index
from graphopt.hierarchical.matrix import HMatrix
from tests.hierarchical.built import Case, build, cases, few, kernel, points


def far(matrix: HMatrix, values: torch.Tensor) -> float:
    """The Frobenius norm of the difference."""
    return float((matrix.dense().double() - values).norm())


@given(cases(), cases())
@settings(max_examples=15)
def test_sums_hold_their_bound(case: Case, other: Case) -> None:
    where = points(case.n, case.dimensions, case.seed)
    a, k = case.matrix, kernel(other.name, where)
    b = build(k, where, other.structure, other.tolerance, dtype=case.dtype)
    found = add(a, b, case.tolerance)
    assert far(found, case.values + k) <= found.bound
    own = found.bound - a.bound - b.bound
    rounding = 1e4 * torch.finfo(case.dtype).eps
    assert own <= (2 * case.tolerance + rounding) * float((case.values + k).norm())


def test_bounds_of_sums_are_near_the_errors() -> None:
    ratios = []
    for case in few():
        found = add(case.matrix, case.matrix, 1e-4)
        ratios.append(found.bound / max(far(found, 2 * case.values), 1e-14))
    assert statistics.median(ratios) < 10


def test_what_cancels_is_small_and_within_its_bound() -> None:
    a = Case("log", 1, "hodlr", 150, torch.float64, 1e-10, 0).matrix
    found = add(a, scaled(a, -1.0), 1e-6)
    assert found.dense().norm() <= found.bound <= 1e-6 * a.dense().norm()
    assert all(b.rank <= 12 for b in _low_rank(found))


@given(cases())
@settings(max_examples=10)
def test_shifts_multiples_and_transposes(case: Case) -> None:
    a, eye = case.matrix, torch.eye(case.n, dtype=torch.float64)
    for found, wanted in (
        (shifted(a, 2.5), case.values + 2.5 * eye),
        (scaled(a, -0.3), -0.3 * case.values),
        (a.T, case.values.T),
    ):
        assert far(found, wanted) <= found.bound


def test_a_low_rank_block_on_the_diagonal_is_halved_by_a_shift() -> None:
    u = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = HMatrix(LowRank(u, u), by_index(200), by_index(200), 0.0)
    found = shifted(a, 1.0)
    assert isinstance(found.root, Grid)
    assert far(found, u @ u.T + torch.eye(200)) <= found.bound
    assert found.nbytes < 8 * 200 * 200


def test_operands_may_be_transposed_views_and_cut_elsewhere() -> None:
    values = torch.randn(90, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = by_index(90), by_index(60)
    v = values.T.contiguous().T  # columns first
    a = HMatrix(Dense(v), rows, columns, 0.0)
    grid = Grid(
        (
            (Dense(v[:20, :50]), Dense(v[:20, 50:])),
            (Dense(v[20:, :50]), LowRank(v[20:, 50:], torch.eye(10, dtype=v.dtype))),
        )
    )
    found = add(a, HMatrix(grid, rows, columns, 0.0), 1e-10)
    assert far(found, 2 * values) <= found.bound


def test_shared_bases_with_cores_are_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v, core = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((50, 4), (40, 3), (4, 3))
    )
    a = HMatrix(LowRank(u, v, core), by_index(50), by_index(40), 0.0)
    found = add(a, a, 1e-12)
    assert far(found, 2 * u @ core @ v.T) <= found.bound
    assert torch.equal(dense(a.root), u @ core @ v.T)


def test_bad_operands_are_refused() -> None:
    a = Case("log", 1, "hodlr", 40, torch.float64, 1e-6, 0).matrix
    b = Case("log", 1, "hodlr", 41, torch.float64, 1e-6, 0).matrix
    other = Case("log", 1, "hodlr", 40, torch.float64, 1e-6, 7).matrix
    single = Case("log", 1, "hodlr", 40, torch.float32, 1e-6, 0).matrix
    with pytest.raises(ArgumentError, match="rows of both matrices do not fit: 40 and 41"):
        add(a, b, 1e-6)
    with pytest.raises(ArgumentError, match="rows of both matrices have different orders"):
        add(a, other, 1e-6)
    with pytest.raises(ArgumentError, match=r"operands of torch.float64 and torch.float32"):
        add(a, single, 1e-6)
    with pytest.raises(ArgumentError, match=r"tolerance=1e-09 .*float32") as error:
        add(single, single, 1e-9)
    assert "at least 1.2e-07" in str(error.value)
    for wrong in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(ArgumentError, match="is no relative error"):
            add(a, a, wrong)
    with pytest.raises(ArgumentError, match="shift=nan"):
        shifted(a, float("nan"))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.int64, torch.float16])
def test_dtypes_without_bounds_are_refused(dtype: torch.dtype) -> None:
    a = HMatrix(Dense(torch.ones(3, 3, dtype=dtype)), by_index(3), by_index(3), 0.0)
    with pytest.raises(ArgumentError, match=f"no bounds for {dtype}"):
        add(a, a, 1e-3)


def test_nan_is_refused() -> None:
    values = torch.ones(3, 3)
    values[1, 2] = float("nan")
    a = HMatrix(Dense(values), by_index(3), by_index(3), 0.0)
    with pytest.raises(ArgumentError, match="the first matrix has entries that are not finite"):
        add(a, a, 1e-3)


def _low_rank(matrix: HMatrix) -> list[LowRank]:
    from graphopt.hierarchical.blocks import placed

    return [p.block for p in placed(matrix.root) if isinstance(p.block, LowRank)]
