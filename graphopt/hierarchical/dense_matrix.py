"""A matrix that is at hand, in blocks whose errors were measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.admissibility import Admissibility, Pairs, Weak, partition
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.compress import rank, recompress_batch, residual_bound, svd
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.packed import Blocks
from graphopt.hierarchical.rounding import norm, norms

_DOUBLE = torch.float64
# Entries of blocks that are factored together.
_CHUNK = 2**22

Method = Literal["svd", "random"]


def from_dense(
    values: Tensor,
    rows: ClusterTree,
    columns: ClusterTree | None = None,
    *,
    tolerance: float = 1e-6,
    rule: Admissibility | None = None,
    method: Method = "svd",
    dtype: torch.dtype | None = None,
) -> HMatrix:
    """The blocks of a matrix, each of the smallest rank that its share of the tolerance allows.

    Blocks are disjoint, so that errors of norm tolerance * norm / sqrt(count) each are one of
    norm tolerance * norm at most. A block that low rank would not make smaller stays as it is.

    Args:
        values: [m, n], finite, in the original order.
        rows: clusters of rows.
        columns: clusters of columns; None for those of the rows.
        tolerance: of the Frobenius norm of the error, relative to that of the matrix.
        rule: which blocks are of low rank; None for `Weak`.
        method: ``svd`` for the truncated singular value decomposition, ``random`` for the range of
            random samples, doubled until the residual is small enough (less work for large blocks).
        dtype: what values are stored in; None for that of `values`.

    Raises:
        ArgumentError: values that are no matrix of this size, or not finite, or a tolerance below
            what the dtype reaches.
    """
    other = rows if columns is None else columns
    dtype = values.dtype if dtype is None else dtype
    _check(values, rows, other, tolerance, dtype)
    covered = partition(rows, other, rule or Weak())
    inner = rows.to_positions(values.detach())
    inner = other.to_positions(inner.T).T.double()
    size = norm(inner)
    count = max(1, sum(len(pairs) for pairs in covered.far))
    share = 0.999 * tolerance * size * (1 - 1e-9) / math.sqrt(count)
    blocks, squares = Blocks(rows, other), 0.0
    for pairs in covered.far:
        for part, own in _gathered(inner, rows, other, pairs):
            found = _random(own, share) if method == "random" else _truncated(own, share)
            squares += _collect(blocks, part, own, found, rows, other, dtype)
    for part, own in _gathered(inner, rows, other, covered.near):
        squares += _collect(blocks, part, own, None, rows, other, dtype)
    bound = math.sqrt(squares) * (1 + 1e-12)
    if bound > tolerance * size:
        raise ArgumentError(
            f"a relative error of {tolerance:.1e} is out of reach of {dtype}: "
            f"{bound / size:.1e} was reached",
            hint="pass a larger tolerance, or dtype=torch.float64",
        )
    return HMatrix(None, rows, other, bound, blocks.packed())


def _check(
    values: Tensor, rows: ClusterTree, columns: ClusterTree, tolerance: float, dtype: torch.dtype
) -> None:
    shape = len(rows), len(columns)
    if values.shape != shape or not values.dtype.is_floating_point:
        raise ArgumentError(
            f"values are {tuple(values.shape)} {values.dtype}",
            hint=f"pass a float tensor of {list(shape)}, as the trees have it",
        )
    if dtype not in (torch.float32, _DOUBLE):
        raise ArgumentError(f"blocks cannot be stored in {dtype}", hint="pass torch.float32")
    if not 0 < tolerance < 1:
        raise ArgumentError(f"a tolerance of {tolerance}", hint="pass one between 0 and 1")
    finite = values.isfinite()
    if not bool(finite.all()):
        place = tuple((~finite).nonzero()[0].tolist())
        raise ArgumentError(f"the entry {place} is not finite", hint="remove or mend it")


def _gathered(
    values: Tensor, rows: ClusterTree, columns: ClusterTree, pairs: Pairs
) -> Iterator[tuple[Pairs, Tensor]]:
    """Some blocks at a time, [b, m, n] with zeros where clusters lack a row."""
    own, other = rows.positions[pairs.row_level], columns.positions[pairs.column_level]
    step = max(1, _CHUNK // (own.shape[1] * other.shape[1]))
    for start in range(0, len(pairs), step):
        part = pairs.only(slice(start, start + step))
        i, j = own[part.rows].unsqueeze(2), other[part.columns].unsqueeze(1)
        found = values[i.clamp(max=len(rows) - 1), j.clamp(max=len(columns) - 1)]
        yield part, found * ((i < len(rows)) & (j < len(columns))).to(values.device)


def _truncated(values: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [b, m, r] and [b, n, r], and how many columns each block needs."""
    left, sizes, right = svd(values)
    keep = rank(sizes, sizes.new_full((len(values),), share))
    most = int(keep.max())
    sizes = sizes[:, :most] * (torch.arange(most, device=keep.device) < keep.unsqueeze(1))
    return left[..., :most] * sizes.unsqueeze(1), right[..., :most], keep


def _random(values: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `_truncated`, from samples of the range (Halko, Martinsson and Tropp 2011)."""
    most = min(values.shape[1:])
    generator = torch.Generator().manual_seed(0)
    samples = min(16, most)
    goal = values.new_full((len(values),), 0.5 * share)
    while True:
        noise = torch.randn(values.shape[2], samples, generator=generator, dtype=_DOUBLE)
        spread = torch.linalg.qr(values @ noise.to(values.device))[0]
        inner = spread.mT @ values
        left = norms(values - spread @ inner)
        if samples == most or bool((left <= goal).all()):
            break
        samples = min(2 * samples, most)
    # What the samples have left out and what is cut now are orthogonal.
    room = (0.99 * share**2 - left.square()).clamp(min=0).sqrt()
    first, second, _ = recompress_batch(spread, inner.mT, room)
    return first, second, (first != 0).any(1).sum(1)


def _collect(
    blocks: Blocks,
    pairs: Pairs,
    values: Tensor,
    factors: tuple[Tensor, Tensor, Tensor] | None,
    rows: ClusterTree,
    columns: ClusterTree,
    dtype: torch.dtype,
) -> float:
    """Add blocks as they are stored; the sum of the squares of their errors."""
    squares = 0.0
    height = (rows.starts[pairs.row_level].diff()).tolist()
    width = (columns.starts[pairs.column_level].diff()).tolist()
    stored = values.to(dtype)
    lost = norms(values - stored.double()).tolist()
    if factors is not None:
        left, right = factors[0].to(dtype), factors[1].to(dtype)
        errors, keep = residual_bound(values, left, right).tolist(), factors[2].tolist()
    where = zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True)
    for i, (row, column) in enumerate(where):
        place = pairs.row_level, row, pairs.column_level, column
        m, n = height[row], width[column]
        if factors is None or keep[i] * (m + n) >= m * n:
            blocks.dense(*place, stored[i, :m, :n])
            squares += lost[i] ** 2
        else:
            blocks.low_rank(*place, left[i, :m, : keep[i]], right[i, :n, : keep[i]])
            squares += errors[i] ** 2
    return squares
