"""Sums of outer products of rows: the common part of all dense moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops.packing import pack

# Elements of a temporary copy: small enough for the caches, large enough for fast products.
WORKSPACE = 2**20
# From `_LEAST_TILED` columns on, block rows of `_TILE` up to the diagonal beat one full product.
_TILE = 128
_LEAST_TILED = 256


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a moment of `tensor`: float64 for float64, else float32.

    Raises:
        ArgumentError: the tensor is not real floating-point.
    """
    if not tensor.is_floating_point():
        raise ArgumentError(
            f"a moment is taken of real floating-point values, not of {tensor.dtype}",
            hint="count indices with graphopt::token_counts",
        )
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def piece_size(width: int, ones: bool, pieces: int) -> int:
    """Rows of each diagonal block when `width` columns, and the constant one, are cut.

    Raises:
        ArgumentError: the columns cannot be cut into that many equal pieces.
    """
    total = width + int(ones)
    if pieces < 1 or total % pieces:
        raise ArgumentError(
            f"{total} columns cannot be cut into pieces={pieces} equal pieces",
            hint="pass a divisor of the number of columns, the constant one included",
        )
    return total // pieces


def in_steps(rows: Tensor) -> Iterator[Tensor]:
    """`rows` [B, N, d] in the dtype of their moment, cut along N where that needs a copy."""
    dtype = working_dtype(rows)
    batch, count, width = rows.shape
    step = max(1, count)
    if dtype is not rows.dtype:
        step = max(1, WORKSPACE // max(1, batch * width))
    for part in torch.split(rows, step, 1):
        yield part.to(dtype)


def moment(
    parts: Iterable[Tensor], like: Tensor, width: int, ones: bool, pieces: int, scale: float
) -> Tensor:
    """``scale * Σ_n r_n r_nᵀ``, its diagonal blocks packed.

    Args:
        parts: the rows as tensors [B, N_i, width] in the dtype of the result, any strides.
        like: a tensor [B, ...] with the batch, dtype and device of the result; may be empty.
        width: columns of the rows.
        ones: whether each row ends in a further 1.
        pieces: number of equal diagonal blocks.
        scale: factor of the sum.

    Returns:
        [B * pieces, s * (s + 1) / 2] for blocks of s rows.
    """
    size = piece_size(width, ones, pieces)
    batch = like.shape[0]
    edges = [(i * size, min((i + 1) * size, width)) for i in range(pieces)]
    grams = [like.new_zeros(batch, stop - start, stop - start) for start, stop in edges]
    start_of_last, _ = edges[-1]
    sums = like.new_zeros(batch, width - start_of_last)
    count = 0
    for part in parts:
        for (start, stop), gram in zip(edges, grams, strict=True):
            _add_gram(gram, part[..., start:stop])
        if ones:
            sums += part[..., start_of_last:].sum(1)
            count += part.shape[1]
    packed = [pack(gram) for gram in grams]
    if ones:
        packed[-1] = with_ones(packed[-1], sums, count)
    result = packed[0] if pieces == 1 else torch.stack(packed, 1).flatten(0, 1)
    return result.mul_(scale)


def with_ones(packed: Tensor, sums: Tensor, count: int) -> Tensor:
    """The packed moment of rows that end in a 1, from that of the rows without it.

    The additional, last row of the matrix is the sum of the rows and their number.

    Args:
        packed: [B, d * (d + 1) / 2].
        sums: [B, d], the rows summed.
        count: number of rows.
    """
    return torch.cat([packed, sums, sums.new_full((sums.shape[0], 1), count)], 1)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Adds ``rowsᵀ rows`` to the lower triangle of `total` [B, d, d]; the rest is undefined."""
    batch, width, _ = total.shape
    tile = _TILE if width >= _LEAST_TILED else max(1, width)
    for start in range(0, width, tile):
        stop = min(start + tile, width)
        left, right = rows[..., start:stop].mT, rows[..., :stop]
        if batch == 1:
            total[0, start:stop, :stop].addmm_(left[0], right[0])
        else:
            total[:, start:stop, :stop].baddbmm_(left, right)
