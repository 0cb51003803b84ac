"""Sums, multiples and shifts of matrices in blocks."""

from __future__ import annotations

import math

import torch

from graphopt.errors import ArgumentError
from graphopt.hierarchical.arithmetic.magnitudes import length, magnitude, root_of_squares
from graphopt.hierarchical.arithmetic.operands import (
    check_dtypes,
    check_same,
    check_square,
    check_tolerance,
    confidence,
    estimated_norm,
    operand,
)
from graphopt.hierarchical.arithmetic.parts import (
    LEAF,
    any_tensor,
    apply,
    common,
    factors,
    halved,
    recut,
)
from graphopt.hierarchical.arithmetic.truncation import truncated
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, dense
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.rounding import gamma, norm


@torch.no_grad()
def add(first: HMatrix, second: HMatrix, tolerance: float) -> HMatrix:
    """``first + second``, with low-rank blocks recompressed.

    Blocks of both are cut where one of them is. A dense block and a low-rank one make a dense one.

    Args:
        first: [m, n].
        second: [m, n], over the same orders of rows and columns.
        tolerance: of truncation, relative to the Frobenius norm of the sum, which random vectors
            estimate, or to the rounding of both operands where they cancel out.

    Returns:
        The sum; its bound is what was truncated, rounding, and the bounds of both.

    Raises:
        ArgumentError: operands that do not fit, are not finite, or a tolerance out of reach.
    """
    first, second = operand(first, "the first matrix"), operand(second, "the second matrix")
    check_dtypes(first.dtype, second.dtype)
    check_tolerance(tolerance, first.dtype)
    check_same(first.rows, second.rows, "the rows of both matrices")
    check_same(first.columns, second.columns, "the columns of both matrices")
    a, b = first.root, second.root
    size = estimated_norm(lambda x: apply(a, x) + apply(b, x), first.shape[1], any_tensor(a))
    least = gamma(1, first.dtype) * (magnitude(a) + magnitude(b))
    each = tolerance * max(size, least) / math.sqrt(max(_both_low(a, b), 1))
    root, error = _sum(a, b, each)
    bound = error + first.bound + second.bound
    return HMatrix(root, first.rows, first.columns, bound, confidence=confidence(first, second))


@torch.no_grad()
def scaled(matrix: HMatrix, scale: float) -> HMatrix:
    """``scale * matrix``.

    Raises:
        ArgumentError: a scale or matrix that is not finite.
    """
    _check_number(scale, "scale")
    matrix = operand(matrix, "the matrix")
    lost = 2 * gamma(1, matrix.dtype) * magnitude(matrix.root) * abs(scale)
    root = _scaled(matrix.root, scale)
    bound = abs(scale) * matrix.bound + lost
    return HMatrix(root, matrix.rows, matrix.columns, bound, confidence=matrix.confidence)


@torch.no_grad()
def shifted(matrix: HMatrix, shift: float) -> HMatrix:
    """``matrix + shift * I``; a low-rank block on the diagonal is halved down to dense ones.

    Raises:
        ArgumentError: it is not square, rows and columns have different orders, or something is
            not finite.
    """
    _check_number(shift, "shift")
    check_square(matrix)
    check_same(matrix.rows, matrix.columns, "rows and columns")
    matrix = operand(matrix, "the matrix")
    root, error = shifted_block(matrix.root, shift)
    bound = matrix.bound + error
    return HMatrix(root, matrix.rows, matrix.columns, bound, confidence=matrix.confidence)


def shifted_block(block: Block, shift: float) -> tuple[Block, float]:
    """``block + shift * I`` for a square block, and what it loses by rounding."""
    if isinstance(block, LowRank) and block.shape[0] > LEAF:
        block = halved(block)
    if isinstance(block, Grid):
        spans = common(block.row_spans, block.column_spans)
        block = recut(block, spans, spans)
        if len(spans) == 1:
            return shifted_block(block.blocks[0][0], shift)
        lines, errors = [list(line) for line in block.blocks], []
        for i in range(len(spans)):
            lines[i][i], error = shifted_block(block.blocks[i][i], shift)
            errors.append(error)
        return Grid(tuple(tuple(line) for line in lines)), root_of_squares(errors)
    values = dense(block).clone()
    values.diagonal().add_(shift)
    formed = 0.0
    if isinstance(block, LowRank):
        formed = gamma(block.rank + 1, values.dtype) * magnitude(block)
    return Dense(values), formed + gamma(1, values.dtype) * norm(values.diagonal())


# -- helpers ------------------------------------------------------------------------------------


def _sum(a: Block, b: Block, tolerance: float) -> tuple[Block, float]:
    if isinstance(a, Grid) or isinstance(b, Grid):
        a, b = _cut_alike(a, b)
        lines: list[tuple[Block, ...]] = []
        errors: list[float] = []
        for line, other in zip(a.blocks, b.blocks, strict=True):
            pairs = [_sum(x, y, tolerance) for x, y in zip(line, other, strict=True)]
            lines.append(tuple(block for block, _ in pairs))
            errors.extend(error for _, error in pairs)
        return Grid(tuple(lines)), root_of_squares(errors)
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return truncated([factors(a), factors(b)], tolerance)
    dtype = any_tensor(a).dtype
    lost = gamma(max(length(a), length(b)) + 1, dtype) * (magnitude(a) + magnitude(b))
    if isinstance(a, Dense) and isinstance(b, Dense):
        found = a.values + b.values
        return Dense(found), gamma(1, dtype) * norm(found)
    return Dense(dense(a) + dense(b)), lost


def _cut_alike(a: Block, b: Block) -> tuple[Grid, Grid]:
    grids = [block for block in (a, b) if isinstance(block, Grid)]
    rows = common(grids[0].row_spans, grids[-1].row_spans)
    columns = common(grids[0].column_spans, grids[-1].column_spans)
    return recut(a, rows, columns), recut(b, rows, columns)


def _both_low(a: Block, b: Block) -> int:
    """How many sums of two low-rank blocks there are."""
    if isinstance(a, Grid) or isinstance(b, Grid):
        a, b = _cut_alike(a, b)
        return sum(
            _both_low(x, y)
            for line, other in zip(a.blocks, b.blocks, strict=True)
            for x, y in zip(line, other, strict=True)
        )
    return isinstance(a, LowRank) and isinstance(b, LowRank)


def _scaled(block: Block, scale: float) -> Block:
    if isinstance(block, Dense):
        return Dense(block.values * scale)
    if isinstance(block, LowRank):
        return LowRank(block.left * scale, block.right)
    return Grid(tuple(tuple(_scaled(b, scale) for b in line) for line in block.blocks))


def _check_number(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise ArgumentError(f"{name}={value} is no finite number", hint="pass one")
