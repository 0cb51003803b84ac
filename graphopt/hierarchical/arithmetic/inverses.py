"""The inverse of a matrix in blocks."""

from __future__ import annotations

import math

import torch

from graphopt.hierarchical.arithmetic.algebra import shifted_block
from graphopt.hierarchical.arithmetic.factorization import Factorization
from graphopt.hierarchical.arithmetic.factorize import lu
from graphopt.hierarchical.arithmetic.inverse_norm import FAILURE, PROBES, RISK, probes, solved
from graphopt.hierarchical.arithmetic.magnitudes import length, magnitude
from graphopt.hierarchical.arithmetic.operands import check_tolerance, confidence, low_rank_count
from graphopt.hierarchical.arithmetic.parts import any_tensor, apply
from graphopt.hierarchical.arithmetic.pending import Pending
from graphopt.hierarchical.arithmetic.products import zero
from graphopt.hierarchical.arithmetic.triangular import Triangle, corner, solve_block
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.probability import norm_factor
from graphopt.hierarchical.rounding import gamma, norm


@torch.no_grad()
def inverse(matrix: HMatrix | Factorization, tolerance: float) -> HMatrix:
    """The inverse in the blocks of the matrix: the identity, solved with both triangles.

    Args:
        matrix: square; or its factors, whose own error then counts.
        tolerance: of truncation, relative to the Frobenius norm of the inverse. That of the
            factors is relative to the matrix, so that what it does to the inverse is larger by
            the condition number.

    Returns:
        The inverse. Its bound comes from random vectors and from ``|M^-1 (A - M) A^-1|``, see
        `Factorization`; it is inf where the matrix may be singular within its own bound.

    Raises:
        ArgumentError: as `lu`.
    """
    found = matrix if isinstance(matrix, Factorization) else lu(matrix, tolerance)
    plain, factors, norms = found.matrix, found.factors, found.norms
    check_tolerance(tolerance, plain.dtype)
    some = any_tensor(plain.root)
    identity, _ = shifted_block(zero(plain.root, some), 1.0)
    count = math.sqrt(low_rank_count(identity))
    # What is dropped before a solve grows by the inverse of what is solved with.
    known = math.isfinite(norms.spectral)
    size = norms.frobenius / norms.spectral if known else 1.0
    half, _ = solve_block(factors.lower, identity, Pending(), tolerance * size / (2 * count))
    size = norms.frobenius / _inverse_size(factors.upper) if known else 1.0
    root, _ = solve_block(
        factors.upper, half, Pending(), tolerance * size / (2 * count), transpose=True
    )
    normal = probes(plain.shape[0], some, seed=1)
    wanted = solved(factors, normal)
    lost = gamma(length(root) + 1, torch.float64) * magnitude(root) * norm(normal)
    lost += norms.spectral * norms.lost * norm(wanted)
    far = (
        norm_factor(PROBES, FAILURE)
        * (norm(apply(root, normal) - wanted) + lost)
        / math.sqrt(PROBES)
    )
    bound = far + found.distance * found.inverse_norm if found.bound else far
    bound = bound if math.isfinite(bound) else math.inf
    sure = confidence(plain, lost=RISK)
    return HMatrix(root, plain.columns, plain.rows, bound, confidence=sure)


def _inverse_size(operator: Triangle) -> float:
    """About the spectral norm of the inverse of a triangle, by some steps of power iteration."""
    x = probes(operator.size, corner(operator).values, seed=2)
    size = 0.0
    for _ in range(3):
        x = x / torch.linalg.vector_norm(x, dim=0)
        y = operator.solve(x)
        size = float(torch.linalg.vector_norm(y, dim=0).max())
        x = operator.solve(y, transpose=True)
    return size
