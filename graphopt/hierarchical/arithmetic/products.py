"""Products of matrices in blocks."""

from __future__ import annotations

import math

import torch

from graphopt.hierarchical.arithmetic.magnitudes import magnitude
from graphopt.hierarchical.arithmetic.operands import (
    check_dtypes,
    check_same,
    check_tolerance,
    confidence,
    estimated_norm,
    low_rank_count,
    operand,
)
from graphopt.hierarchical.arithmetic.parts import (
    any_tensor,
    apply,
    common,
    frobenius,
    recut,
)
from graphopt.hierarchical.arithmetic.pending import Pending, Product, fill
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.rounding import gamma


@torch.no_grad()
def multiply(
    first: HMatrix, second: HMatrix, tolerance: float, like: HMatrix | None = None
) -> HMatrix:
    """``first @ second``, every low-rank block truncated once.

    Args:
        first: [m, k].
        second: [k, n], whose rows have the order of the columns of `first`.
        tolerance: of truncation, relative to the Frobenius norm of the product, which random
            vectors estimate, or to the rounding of the product where it nearly vanishes.
        like: a matrix with the blocks that the product shall have. By default they are those of
            `first` if `second` is square, those of `second` if `first` is, and else what the
            blocks of both suggest.

    Returns:
        The product. Its bound is what was truncated, rounding, and what the bounds of the factors
        come to: ``|A| b + a |B| + a b``.

    Raises:
        ArgumentError: operands that do not fit, are not finite, or a tolerance out of reach.
    """
    first, second = operand(first, "the first matrix"), operand(second, "the second matrix")
    check_dtypes(first.dtype, second.dtype)
    check_tolerance(tolerance, first.dtype)
    check_same(first.columns, second.rows, "columns of the first and rows of the second matrix")
    a, b = first.root, second.root
    if like is not None:
        check_same(first.rows, like.rows, "rows of the first matrix and of `like`")
        check_same(second.columns, like.columns, "columns of the second matrix and of `like`")
        form = zero(like.root, any_tensor(a))
    elif second.shape[0] == second.shape[1]:
        form = zero(a, any_tensor(a))
    elif first.shape[0] == first.shape[1]:
        form = zero(b, any_tensor(a))
    else:
        form = _form(a, b)
    size = estimated_norm(lambda x: apply(a, apply(b, x)), second.shape[1], any_tensor(a))
    least = gamma(1, first.dtype) * magnitude(a) * magnitude(b)
    each = tolerance * max(size, least) / math.sqrt(low_rank_count(form))
    root, error = fill(form, Pending((Product(a, b),)), each)
    error += frobenius(a) * second.bound + first.bound * frobenius(b) + first.bound * second.bound
    return HMatrix(root, first.rows, second.columns, error, confidence=confidence(first, second))


def zero(block: Block, like: torch.Tensor) -> Block:
    """Zeros in the form of `block`, in the dtype of `like`."""
    if isinstance(block, Grid):
        return Grid(tuple(tuple(zero(b, like) for b in line) for line in block.blocks))
    m, n = block.shape
    if isinstance(block, Dense):
        return Dense(like.new_zeros(m, n))
    return LowRank(like.new_zeros(m, 0), like.new_zeros(n, 0))


def _form(a: Block, b: Block) -> Block:
    """Zeros in a form for ``a @ b``: as fine as the finest of the products that a block sums."""
    like = any_tensor(a)
    m, n = a.shape[0], b.shape[1]
    if not (isinstance(a, Grid) and isinstance(b, Grid)):
        if isinstance(a, Dense) and isinstance(b, Dense):
            return Dense(like.new_zeros(m, n))
        return LowRank(like.new_zeros(m, 0), like.new_zeros(n, 0))
    inner = common(a.column_spans, b.row_spans)
    a, b = recut(a, a.row_spans, inner), recut(b, inner, b.column_spans)
    lines = []
    for line in a.blocks:
        found = []
        for column in zip(*b.blocks, strict=True):
            forms = [_form(x, y) for x, y in zip(line, column, strict=True)]
            found.append(max(forms, key=lambda f: (isinstance(f, Grid), isinstance(f, Dense))))
        lines.append(tuple(found))
    return Grid(tuple(lines))
