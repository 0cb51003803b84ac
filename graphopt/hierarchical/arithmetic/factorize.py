"""LU and Cholesky of matrices in blocks."""

from __future__ import annotations

import math

import torch

from graphopt.errors import ArgumentError, NotDefiniteError
from graphopt.hierarchical.arithmetic.algebra import shifted
from graphopt.hierarchical.arithmetic.factor import LeafError, factored
from graphopt.hierarchical.arithmetic.factorization import Factorization, product_loss
from graphopt.hierarchical.arithmetic.operands import (
    check_same,
    check_square,
    check_tolerance,
    estimated_norm,
    low_rank_count,
    operand,
)
from graphopt.hierarchical.arithmetic.parts import any_tensor, apply, diagonal, frobenius
from graphopt.hierarchical.blocks import Block
from graphopt.hierarchical.matrix import HMatrix
from graphopt.notices import warn

ATTEMPTS = 12  # each with ten times the nugget of the one before


@torch.no_grad()
def lu(matrix: HMatrix, tolerance: float) -> Factorization:
    """LU with partial pivoting in the dense blocks on the diagonal.

    Pivots do not cross blocks, as in all H-LU: a matrix with nearly singular leading blocks loses
    digits, which the bounds show. Blocks on the diagonal that are low-rank are halved.

    Args:
        matrix: square.
        tolerance: of the backward error by truncation, relative to the Frobenius norm.

    Raises:
        ArgumentError: it is not square, not finite, or has a singular leaf; or a tolerance out of
            reach.
    """
    check_square(matrix)
    plain = operand(matrix, "the matrix")
    check_tolerance(tolerance, plain.dtype)
    try:
        factors = factored(plain.root, _each(plain.root, tolerance), symmetric=False)
    except LeafError as error:
        raise ArgumentError(
            f"LU meets a singular block at {_where(error)}",
            hint="add a shift to the diagonal, or use larger leaves",
        ) from None
    return Factorization(plain, factors, symmetric=False, nugget=0.0, known=math.inf)


@torch.no_grad()
def cholesky(
    matrix: HMatrix,
    tolerance: float,
    nugget: float = 0.0,
    least_eigenvalue: float = 0.0,
) -> Factorization:
    """Cholesky factors of a matrix that stands for a symmetric positive definite one.

    Args:
        matrix: square, rows and columns of one order. Its blocks below the diagonal are read.
        tolerance: of the backward error by truncation, relative to the Frobenius norm.
        nugget: where truncation has left the matrix indefinite, this much of the mean of the
            diagonal (or, if that is zero, of a row's norm) is added to it, ten times more with each
            attempt, with a warning. Everything is then about the matrix with what was added. 0
            raises instead.
        least_eigenvalue: a lower bound of the eigenvalues of the true matrix, such as the noise of
            a Gaussian process; bounds are then smaller, and those of `solve` hold for sure.

    Raises:
        NotDefiniteError: it is indefinite, also with all nuggets.
        ArgumentError: it is not square, not symmetric within its bound, or not finite; or a
            tolerance out of reach.
    """
    check_square(matrix)
    check_same(matrix.rows, matrix.columns, "rows and columns")
    plain = operand(matrix, "the matrix")
    check_tolerance(tolerance, plain.dtype)
    if not (0 <= nugget < math.inf and 0 <= least_eigenvalue < math.inf):
        raise ArgumentError(
            f"nugget={nugget}, least_eigenvalue={least_eigenvalue}", hint="pass none below 0"
        )
    _check_symmetric(plain)
    mean = float(diagonal(plain.root).abs().mean())
    # Of a diagonal of zeros nothing would be added.
    unit = nugget * (mean or frobenius(plain.root) / math.sqrt(len(plain.rows)))
    added = 0.0
    for attempt in range(ATTEMPTS + 1):
        now = shifted(plain, added) if added else plain
        try:
            factors = factored(now.root, _each(now.root, tolerance), symmetric=True)
        except LeafError as error:
            if attempt < ATTEMPTS and unit:
                added = unit * 10.0**attempt
                continue
            raise NotDefiniteError(
                f"the matrix is not positive definite at {_where(error)}"
                + (f", also with {added:.3g} on its diagonal" if added else ""),
                hint="use a smaller tolerance, or add a nugget to the diagonal (nugget=1e-8)",
            ) from None
        break
    if added:
        warn(
            f"the matrix is not positive definite: {added:.3g} was added to its diagonal",
        )
    least = least_eigenvalue + added if least_eigenvalue else 0.0
    known = 1 / least if least else math.inf
    return Factorization(now, factors, symmetric=True, nugget=added, known=known)


def _each(block: Block, tolerance: float) -> float:
    return tolerance * frobenius(block) / math.sqrt(low_rank_count(block))


def _where(error: LeafError) -> str:
    return f"positions {error.rows[0]} to {error.rows[1] - 1}"


def _check_symmetric(matrix: HMatrix) -> None:
    """By random vectors: ``|A - A.T|_F`` is at most twice the bound of A."""
    root = matrix.root
    far = estimated_norm(
        lambda x: apply(root, x) - apply(root, x, transpose=True),
        len(matrix.rows),
        any_tensor(root),
    )
    # Entries of both halves may have been rounded apart. The estimate is three times too large
    # with a probability below 1e-10.
    allowed = 2 * (matrix.bound + product_loss(matrix))
    allowed = 3 * (allowed + 4 * torch.finfo(matrix.dtype).eps * frobenius(root))
    if far > allowed:
        raise ArgumentError(
            "the matrix is not symmetric within its bound", hint="use lu, or symmetrise it"
        )
