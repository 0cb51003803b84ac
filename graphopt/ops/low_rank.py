"""Second moments of large sides as low rank plus a diagonal, never formed as matrices.

    low_rank_moment(Tensor rows, bool ones, int rank, Scalar scale) -> Tensor
    low_rank_patch_moment(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,
        int groups, bool transposed, int[] output_padding, bool ones, int rank, Scalar scale)
        -> Tensor
    low_rank_diagonal(Tensor diagonal, int rank) -> Tensor
    low_rank_sum(Tensor[] values, int size) -> Tensor

A moment A of size d is kept as r rows R and its exact diagonal, ``[B, (r + 1) d]``: what stands for
A is ``RᵀR`` with its diagonal replaced by that of A. Rows are only ever multiplied from the left by
matrices with orthonormal rows, so that E = A - RᵀR stays positive semi-definite, whatever was
added, averaged or cut. Hence its trace, which is known exactly, bounds all that is left out:
``|A - Â|_F ≤ sqrt((tr E)² - Σ E_ii²) ≤ tr E``.

Up to about twice the rank the leading directions are exact, by the Gram matrix of the rows; more
rows are first projected to the range of random directions, sharpened by one power iteration
(Halko, Martinsson and Tropp, SIAM Review 2011, arXiv 0909.4061, algorithms 4.3 and 4.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops import moments_patch as patch
from graphopt.ops import moments_rows as rows_
from graphopt.ops.moments_window import PatchArguments

# Random directions beyond the rank.
_SPARE = 8
_SEED = 20110
# Numbers of a copy of some rows.
_CHUNK = 2**24

_WINDOW = (
    "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool transposed, "
    "int[] output_padding"
)
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "low_rank_moment(Tensor rows, bool ones, int rank, Scalar scale) -> Tensor",
    f"low_rank_patch_moment(Tensor x, {_WINDOW}, bool ones, int rank, Scalar scale) -> Tensor",
    "low_rank_diagonal(Tensor diagonal, int rank) -> Tensor",
    "low_rank_sum(Tensor[] values, int size) -> Tensor",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)


def low_rank_moment(rows: Tensor, ones: bool, rank: int, scale: float) -> Tensor:
    """``scale * Σ_n r_n r_nᵀ`` as low rank plus a diagonal.

    Args:
        rows: [B, N, d], any strides.
        ones: whether a constant 1 ends each row.
        rank: rows that are kept; fewer rows are kept as they are, and filled up with zeros.
        scale: factor of the sum; not negative.

    Returns:
        [B, (rank + 1) d], with `ones` [B, (rank + 1) (d + 1)]; float64 for float64, else float32.

    Raises:
        ArgumentError: wrong rank, dtype or scale.
    """
    _check(rank, scale)
    if rows.dim() != 3:
        raise ArgumentError(
            f"rows have shape [batch, rows, columns], not {tuple(rows.shape)}",
            hint="reshape them, with a batch of 1 where there is a single matrix",
        )
    step = max(4 * rank, _CHUNK // max(1, rows.shape[0] * (rows.shape[2] + 1)))
    parts = torch.split(rows, step, 1) if rows.shape[1] else ()
    return _collected(parts, _like(rows, rows.shape[0]), rows.shape[2], ones, rank, scale)


def low_rank_patch_moment(x: Tensor, *arguments: Any) -> Tensor:
    """The same of the patches of a convolution, [groups, (rank + 1) d]; see `patch_moment`."""
    *window, ones, rank, scale = arguments
    _check(rank, scale)
    args = PatchArguments.of(*window, ones, 1, scale)
    width = patch.patch_width(x, args)
    parts = patch.patches(x, args, _CHUNK)
    return _collected(parts, _like(x, args.groups), width, ones, rank, scale)


def low_rank_diagonal(diagonal: Tensor, rank: int) -> Tensor:
    """A diagonal [B, d] as a moment without rows."""
    return torch.nn.functional.pad(diagonal, (rank * diagonal.shape[1], 0))


def low_rank_sum(values: Sequence[Tensor], size: int) -> Tensor:
    """The sum of moments [B, (r + 1) d] of one shape."""
    return weighted_sum(values, [1.0] * len(values), size)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float], size: int) -> Tensor:
    """``Σ w A`` of moments of one shape, cut to their rank; no weight is negative."""
    parts = [parts_of(value, size) for value in values]
    rank = parts[0][0].shape[1]
    rows = torch.cat([r * w**0.5 for (r, _), w in zip(parts, weights, strict=True)], 1)
    diagonal = torch.stack([d * w for (_, d), w in zip(parts, weights, strict=True)]).sum(0)
    return torch.cat((leading(rows, rank), diagonal[:, None]), 1).flatten(1)


def scaled(value: Tensor, factor: float, size: int) -> Tensor:
    """A moment times a number that is not negative."""
    rows, diagonal = parts_of(value, size)
    return torch.cat((rows * factor**0.5, diagonal[:, None] * factor), 1).flatten(1)


def parts_of(value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """R [B, r, d] and the diagonal [B, d], as views.

    Raises:
        ArgumentError: the moment is of another size.
    """
    if value.dim() != 2 or value.shape[1] % size:
        raise ArgumentError(
            f"a tensor of shape {tuple(value.shape)} does not hold rows of size {size}",
            hint="pass a moment of shape [blocks, (rank + 1) * size]",
        )
    matrix = value.view(len(value), -1, size)
    return matrix[:, :-1], matrix[:, -1]


def rest(rows: Tensor, diagonal: Tensor) -> Tensor:
    """The diagonal [B, d] of E = A - RᵀR; rounding makes it no less than 0."""
    return (diagonal - rows.square().sum(1)).clamp(min=0)


def bound(value: Tensor, size: int) -> tuple[float, float]:
    """What is left out of all blocks of a moment together.

    Returns:
        ``tr E / tr A``, and a bound of ``|A - Â|_F / |A|_F``; both 0 where A is.
    """
    rows, diagonal = (part.double() for part in parts_of(value, size))
    left = rest(rows, diagonal)
    trace = float(diagonal.sum())
    error = left.sum(1).square() - left.square().sum(1)
    gram = rows @ rows.mT
    # |A|_F² = |Â|_F² + what is off the diagonals of E; the least that is known of it is |RᵀR|_F².
    least = torch.maximum(gram.square().sum((1, 2)), diagonal.square().sum(1))
    norm = float(least.sum())
    if trace <= 0 or norm <= 0:
        return 0.0, 0.0
    return float(left.sum()) / trace, (float(error.clamp(min=0).sum()) / norm) ** 0.5


def inner(one: Tensor, other: Tensor, size: int) -> Tensor:
    """``<Â, B̂>`` of two moments of one shape, without their matrices; float64, no dimension."""
    (r, d), (s, e) = (parts_of(value, size) for value in (one, other))
    left, right = rest(r, d), rest(s, e)
    products = (r @ s.mT).double().square().sum()
    for row, diagonal in ((r, right), (s, left)):
        products = products + (row.square().sum(1).double() * diagonal.double()).sum()
    total: Tensor = products + (left.double() * right.double()).sum()
    return total


def leading(rows: Tensor, rank: int) -> Tensor:
    """P R [B, rank, d], P with orthonormal rows, such that what is left of RᵀR is small.

    Rows that are not finite may give anything; the diagonal beside them tells.
    """
    count = rows.shape[1]
    if count <= rank:
        return torch.nn.functional.pad(rows, (0, 0, 0, rank - count))
    width = rank + _SPARE
    if count > 2 * width:
        rows = rows.nan_to_num(0.0, 0.0, 0.0)
        span = rows @ _directions(rows.shape[2], width).to(rows)
        span = torch.linalg.qr(rows.mT @ torch.linalg.qr(span).Q).Q
        rows = torch.linalg.qr(rows @ span).Q.mT @ rows
        if rows.shape[1] <= rank:  # more directions than columns
            return leading(rows, rank)
    gram = (rows @ rows.mT).double()
    # Scaled to one, so that sizes of numbers do not matter.
    gram = gram / gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-300)[:, None, None]
    _, turn = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0))
    found: Tensor = turn[:, :, -rank:].mT.to(rows.dtype) @ rows
    return found


@lru_cache(maxsize=32)
def _directions(size: int, width: int) -> Tensor:
    """Always the same, so that a result can be had again."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(size, width, generator=generator)


def _collected(
    parts: Iterable[Tensor], like: Tensor, width: int, ones: bool, rank: int, scale: float
) -> Tensor:
    """The moment of rows that come in parts [B, n, width]; `like` [B, 0] has batch and dtype."""
    size = width + int(ones)
    kept = like.new_zeros(like.shape[0], 0, size)
    diagonal = like.new_zeros(like.shape[0], size)
    for part in parts:
        rows = part.to(like.dtype)
        if ones:
            rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        rows = rows * scale**0.5
        diagonal += rows.square().sum(1)
        kept = leading(torch.cat((kept, rows), 1) if kept.shape[1] else rows, rank)
    kept = leading(kept, rank)
    return torch.cat((kept, diagonal[:, None]), 1).flatten(1)


def _like(tensor: Tensor, batch: int) -> Tensor:
    return tensor.new_empty(batch, 0, dtype=rows_.working_dtype(tensor))


def _check(rank: int, scale: float) -> None:
    if rank < 1 or not scale >= 0:
        raise ArgumentError(
            f"a moment of rank {rank} and scale {scale} has no rows",
            hint="pass rank >= 1 and scale >= 0",
        )


def _fake_moment(rows: Tensor, ones: bool, rank: int, scale: float) -> Tensor:
    _check(rank, scale)
    size = rows.shape[2] + int(ones)
    return rows.new_empty(rows.shape[0], (rank + 1) * size, dtype=rows_.working_dtype(rows))


def _fake_patch_moment(x: Tensor, *arguments: Any) -> Tensor:
    *window, ones, rank, scale = arguments
    args = PatchArguments.of(*window, ones, 1, scale)
    size = patch.patch_width(x, args) + int(ones)
    return x.new_empty(args.groups, (rank + 1) * size, dtype=rows_.working_dtype(x))


def _fake_diagonal(diagonal: Tensor, rank: int) -> Tensor:
    return diagonal.new_empty(diagonal.shape[0], (rank + 1) * diagonal.shape[1])


def _fake_sum(values: Sequence[Tensor], size: int) -> Tensor:
    return torch.empty_like(values[0])


for _name, _kernel, _fake in (
    ("low_rank_moment", low_rank_moment, _fake_moment),
    ("low_rank_patch_moment", low_rank_patch_moment, _fake_patch_moment),
    ("low_rank_diagonal", low_rank_diagonal, _fake_diagonal),
    ("low_rank_sum", low_rank_sum, _fake_sum),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
