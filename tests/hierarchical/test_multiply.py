"""Products are within their bounds of dense ones."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings

from graphopt.errors import ArgumentError
from graphopt.hierarchical.arithmetic.products import multiply
from graphopt.hierarchical.blocks import Dense, Grid, LowRank
from graphopt.hierarchical.clusters import by_index
from graphopt.hierarchical.matrix import HMatrix
from tests.hierarchical.built import Case, build, cases, few, kernel, points


def far(matrix: HMatrix, values: torch.Tensor) -> float:
    """The Frobenius norm of the difference."""
    return float((matrix.dense().double() - values).norm())


@given(cases(), cases())
@settings(max_examples=15)
def test_products_hold_their_bound(case: Case, other: Case) -> None:
    where = points(case.n, case.dimensions, case.seed)
    a, k = case.matrix, kernel(other.name, where)
    b = build(k, where, other.structure, other.tolerance, dtype=case.dtype)
    found = multiply(a, b, case.tolerance)
    exact = case.values @ k
    assert far(found, exact) <= found.bound
    of_operands = case.values.norm() * b.bound + k.norm() * a.bound
    rounding = 1e4 * torch.finfo(case.dtype).eps * case.values.norm() * k.norm()
    assert found.bound <= 3 * (case.tolerance * exact.norm() + of_operands) + rounding


def test_bounds_of_products_are_near_the_errors() -> None:
    ratios = []
    for case in few():
        found = multiply(case.matrix, case.matrix, 1e-4)
        ratios.append(found.bound / far(found, case.values @ case.values))
    assert statistics.median(ratios) < 30


def test_large_grids_meet_low_rank_blocks() -> None:
    # More than one level is multiplied without a target that has children.
    where = points(700, 1, seed=0)
    k = kernel("exponential", where)
    strong = build(k, where, "strong", 1e-8, leaf=32)
    tree = strong.rows
    one = HMatrix(
        LowRank(torch.zeros(700, 0).double(), torch.zeros(700, 0).double()), tree, tree, 0.0
    )
    found = multiply(strong, strong, 1e-5, like=one)
    exact = k @ k
    assert far(found, exact) <= found.bound <= 1e-4 * exact.norm()


def test_any_mix_of_blocks_multiplies() -> None:
    where = points(100, 2, seed=0)
    k = kernel("matern", where)
    made = {s: build(k, where, s, 1e-7) for s in ("hodlr", "blr", "strong")}
    for first in made.values():
        for second in made.values():
            found = multiply(first, second, 1e-5)
            assert far(found, k @ k) <= found.bound <= 1e-4 * (k @ k).norm()


def test_rectangular_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    m, k, n = (by_index(s) for s in (90, 70, 50))
    x = torch.randn(90, 70, dtype=torch.float64, generator=generator)
    y = torch.randn(70, 50, dtype=torch.float64, generator=generator)
    u, v = x[:40, :30].clone(), x[:50, 30:70].T
    left = Grid(
        (
            (Dense(x[:40, :30]), LowRank(u, x[40:80, :30])),
            (LowRank(x[:50, :5], x[50:80, :5]), Dense(v.T)),
        )
    )
    right = Grid(((Dense(y[:25]),), (Dense(y[25:]),)))
    a, b = HMatrix(left, m, k, 0.0), HMatrix(right, k, n, 0.0)
    found = multiply(a, b, 1e-12)
    assert found.shape == (90, 50)
    assert far(found, a.dense() @ b.dense()) <= found.bound


def test_what_does_not_fit_is_refused() -> None:
    a = Case("log", 1, "hodlr", 40, torch.float64, 1e-6, 0).matrix
    b = Case("log", 1, "hodlr", 41, torch.float64, 1e-6, 0).matrix
    with pytest.raises(ArgumentError, match="columns of the first and rows of the second matrix"):
        multiply(a, b, 1e-6)
    with pytest.raises(ArgumentError, match="rows of the first matrix and of `like`"):
        multiply(a, a, 1e-6, like=b)
