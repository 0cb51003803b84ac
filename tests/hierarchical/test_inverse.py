"""Inverses are within their bounds of dense ones."""

from __future__ import annotations

import math
import statistics

import torch
from hypothesis import given, settings

from graphopt.hierarchical.arithmetic.factorize import cholesky
from graphopt.hierarchical.arithmetic.inverses import inverse
from graphopt.hierarchical.arithmetic.products import multiply
from graphopt.hierarchical.matrix import HMatrix
from tests.hierarchical.built import Case, cases, few


def far(matrix: HMatrix, values: torch.Tensor) -> float:
    """The Frobenius norm of the difference."""
    return float((matrix.dense().double() - values).norm())


@given(cases())
@settings(max_examples=15)
def test_inverses_hold_their_bound(case: Case) -> None:
    found = inverse(case.matrix, case.tolerance)
    exact = torch.linalg.inv(case.values)
    assert far(found, exact) <= found.bound + 1e-13 * exact.norm()


def test_bounds_are_near_the_errors() -> None:
    ratios = []
    for case in few():
        found = inverse(case.matrix, 1e-6)
        ratios.append(found.bound / far(found, torch.linalg.inv(case.values)))
    assert max(ratios) < math.inf
    assert statistics.median(ratios) < 1000


def test_from_cholesky_and_for_one_factorization_many_tolerances() -> None:
    case = Case("exponential", 2, "strong", 180, torch.float64, 1e-9, 0)
    factors, exact = cholesky(case.matrix, 1e-10), torch.linalg.inv(case.values)
    sizes = []
    for tolerance in (1e-2, 1e-5):
        found = inverse(factors, tolerance)
        assert far(found, exact) <= found.bound
        assert far(found, exact) <= tolerance * exact.norm()
        sizes.append(found.nbytes)
    assert sizes[0] < sizes[1]


def test_the_inverse_times_the_matrix() -> None:
    case = Case("log", 1, "hodlr", 180, torch.float64, 1e-9, 0)
    matrix = case.matrix
    found = multiply(inverse(matrix, 1e-9), matrix, 1e-9)
    assert far(found, torch.eye(180)) <= found.bound < 1


def test_a_matrix_singular_within_its_bound_has_no_bound() -> None:
    plain = Case("exponential", 1, "hodlr", 60, torch.float64, 1e-8, 0).matrix
    found = inverse(HMatrix(plain.root, plain.rows, plain.columns, 2.0), 1e-6)
    assert found.bound == math.inf
