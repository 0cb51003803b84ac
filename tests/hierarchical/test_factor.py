"""Triangular factors multiply to the matrix, within their bound."""

from __future__ import annotations

import statistics
import warnings

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from graphopt.errors import ArgumentError, NotDefiniteError
from graphopt.hierarchical.arithmetic.factorization import Factorization
from graphopt.hierarchical.arithmetic.factorize import cholesky, lu
from graphopt.hierarchical.blocks import Dense, Grid, LowRank
from graphopt.hierarchical.clusters import by_index
from graphopt.hierarchical.matrix import HMatrix
from tests.hierarchical.built import Case, build, cases, few, kernel, points


def product(found: Factorization) -> Tensor:
    """Of the factors, in the original order."""
    lower, upper = found.factors.lower.dense().double(), found.factors.upper.dense().double()
    inner = lower @ upper.T
    order = found.matrix.rows.order
    values = torch.empty_like(inner)
    values[order.unsqueeze(1), found.matrix.columns.order] = inner
    return values


@given(cases())
@settings(max_examples=20)
def test_lu_holds_its_bound(case: Case) -> None:
    found = lu(case.matrix, case.tolerance)
    assert (product(found) - case.values).norm() <= found.bound


@given(cases(definite=True))
@settings(max_examples=20)
def test_cholesky_holds_its_bound(case: Case) -> None:
    found = cholesky(case.matrix, case.tolerance)
    assert (product(found) - case.values).norm() <= found.bound
    own = found.bound - 2**0.5 * found.matrix.bound
    rounding = 1e4 * torch.finfo(case.dtype).eps
    assert own <= (1.01 * case.tolerance + rounding) * case.values.norm()


def test_bounds_are_near_the_errors() -> None:
    ratios = []
    for case in few():
        found = lu(case.matrix, 1e-4)
        ratios.append(found.bound / float((product(found) - case.values).norm()))
    assert statistics.median(ratios) < 10


def test_pivots_of_leaves_are_kept() -> None:
    # Without pivoting this loses all digits: the first pivot of the leaf is nearly 0.
    where = points(96, 1, seed=0)
    k = kernel("exponential", where, shift=0.0)
    tree = by_index(96)
    order = where[:, 0].argsort()
    k = k[order][:, order] + 0.3 * torch.eye(96)
    swapped = k.clone()
    for start in range(0, 96, 2):
        swapped[[start, start + 1]] = k[[start + 1, start]]
    swapped.diagonal().mul_(1e-18)
    matrix = HMatrix(
        Grid(
            (
                (Dense(swapped[:48, :48]), Dense(swapped[:48, 48:])),
                (Dense(swapped[48:, :48]), Dense(swapped[48:, 48:])),
            )
        ),
        tree,
        tree,
        0.0,
    )
    found = lu(matrix, 1e-12)
    assert (product(found) - swapped).norm() <= found.bound < 1e-10
    sign, value = torch.linalg.slogdet(swapped)
    assert found.sign == sign
    assert abs(found.logdet().value - value) <= found.logdet().bound < 1e-6


def test_a_low_rank_diagonal_block_is_filled_by_its_schur_complement() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(150, 2, dtype=torch.float64, generator=generator)
    c = torch.randn(150, 150, dtype=torch.float64, generator=generator) + 20 * torch.eye(150)
    eye = torch.eye(150, dtype=torch.float64)
    root = Grid(((Dense(c), Dense(eye)), (Dense(eye), LowRank(u, u))))
    matrix = HMatrix(root, by_index(300), by_index(300), 0.0)
    found = lu(matrix, 1e-10)
    assert (product(found) - matrix.dense()).norm() <= found.bound < 1e-6


def test_grids_cut_differently_in_rows_and_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 60, dtype=torch.float64, generator=generator) + 15 * torch.eye(60)
    root = Grid(
        ((Dense(x[:20, :35]), Dense(x[:20, 35:])), (Dense(x[20:, :35]), Dense(x[20:, 35:])))
    )
    matrix = HMatrix(root, by_index(60), by_index(60), 0.0)
    found = lu(matrix, 1e-10)
    assert (product(found) - x).norm() <= found.bound < 1e-9


def test_an_indefinite_matrix_raises_or_gets_a_nugget() -> None:
    where = points(120, 1, seed=0)
    k = kernel("matern", where, shift=-0.05)
    matrix = build(k, where, "hodlr", 1e-10)
    with pytest.raises(NotDefiniteError, match="is not positive definite at positions") as error:
        cholesky(matrix, 1e-10)
    assert "nugget" in str(error.value)
    with pytest.warns(UserWarning, match="was added to its diagonal"):
        found = cholesky(matrix, 1e-10, nugget=1e-6)
    assert found.nugget > 0.04
    shifted = k + found.nugget * torch.eye(120, dtype=k.dtype)
    assert (product(found) - shifted).norm() <= found.bound < 1e-6
    with pytest.raises(NotDefiniteError, match=r"also with .* on its diagonal"):
        cholesky(build(-k, where, "hodlr", 1e-10), 1e-10, nugget=1e-30)


def test_a_diagonal_of_zeros_gets_a_nugget_too() -> None:
    where = points(60, 1, seed=0)
    k = kernel("log", where, shift=0.0)
    k.fill_diagonal_(0)
    with pytest.warns(UserWarning, match="was added to its diagonal"):
        found = cholesky(build(k, where, "hodlr", 1e-10), 1e-10, nugget=1e-6)
    shifted = k + found.nugget * torch.eye(60, dtype=k.dtype)
    assert (product(found) - shifted).norm() <= found.bound < 1e-6


def test_a_definite_matrix_gets_no_nugget() -> None:
    case = Case("exponential", 1, "hodlr", 60, torch.float64, 1e-8, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cholesky(case.matrix, 1e-8, nugget=1e-6).nugget == 0


def test_bad_matrices_are_refused() -> None:
    tree = by_index(4)
    ones = HMatrix(Dense(torch.zeros(4, 4)), tree, tree, 0.0)
    with pytest.raises(ArgumentError, match="LU meets a singular block at positions 0 to 3"):
        lu(ones, 1e-3)
    wide = HMatrix(Dense(torch.ones(4, 5)), tree, by_index(5), 0.0)
    with pytest.raises(ArgumentError, match="a matrix of 4 x 5"):
        lu(wide, 1e-3)
    askew = HMatrix(Dense(torch.eye(4) + torch.ones(4, 4).triu(1)), tree, tree, 1e-6)
    with pytest.raises(ArgumentError, match="not symmetric within its bound"):
        cholesky(askew, 1e-3)
    with pytest.raises(ArgumentError, match=r"tolerance=1e-20 is below the precision"):
        lu(ones, 1e-20)
    with pytest.raises(ArgumentError, match="least_eigenvalue=-1"):
        cholesky(ones, 1e-3, least_eigenvalue=-1.0)
