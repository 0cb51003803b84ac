"""Symmetric rank-N update with packed output: only tiles on and below the diagonal are computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.ops.moments_rows import piece_size
from graphopt.ops.packing import packed_length
from graphopt.runtime.kernels.launch import splits_for

# Rows that one step of a program multiplies, and the side of its tile.
STEP = 32
TILE = 64


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def syrk_kernel(  # type: ignore[no-untyped-def]
    rows,
    out,
    count,
    width,
    size,
    pieces,
    batch_stride,
    row_stride,
    column_stride,
    part_rows,
    part_stride,
    scale,
    ONES: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of ``scale * Σ r rᵀ`` of one matrix, over some rows."""
    number = tl.program_id(0)
    matrix = tl.program_id(1)
    part = tl.program_id(2)
    # Tiles are numbered row by row of the lower triangle; a root in float32 may be off by one.
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    j = number - i * (i + 1) // 2

    left = i * TILE + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    first = (matrix % pieces) * size
    base = rows + (matrix // pieces).to(tl.int64) * batch_stride
    left_column = first + left
    right_column = first + right
    left_pointers = base + left_column[:, None].to(tl.int64) * column_stride
    right_pointers = base + right_column[None, :].to(tl.int64) * column_stride
    left_inside = (left < size) & (left_column < width)
    right_inside = (right < size) & (right_column < width)

    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    start = part * part_rows
    stop = tl.minimum(start + part_rows, count)
    for at in range(start, stop, STEP):
        n = at + tl.arange(0, STEP)
        present = n < stop
        offsets = n.to(tl.int64) * row_stride
        a = tl.load(
            left_pointers + offsets[None, :],
            mask=left_inside[:, None] & present[None, :],
            other=0.0,
        )
        b = tl.load(
            right_pointers + offsets[:, None],
            mask=right_inside[None, :] & present[:, None],
            other=0.0,
        )
        if ONES:
            # The homogeneous coordinate is never in memory; what was loaded in its place is 0.
            left_one = (left_column == width)[:, None] & present[None, :]
            right_one = (right_column == width)[None, :] & present[:, None]
            a += left_one.to(tl.float32).to(a.dtype)
            b += right_one.to(tl.float32).to(b.dtype)
        total = tl.dot(a, b, total, input_precision="ieee")

    at_row = left[:, None].to(tl.int64)
    place = at_row * (at_row + 1) // 2 + right[None, :]
    place += matrix.to(tl.int64) * (size.to(tl.int64) * (size + 1) // 2)
    stored = (left[:, None] < size) & (right[None, :] <= left[:, None])
    tl.store(out + part.to(tl.int64) * part_stride + place, total * scale, mask=stored)


def syrk(
    rows: Tensor, ones: bool, pieces: int, scale: float, *, parts: int | None = None
) -> Tensor:
    """`graphopt.ops.moments.second_moment` by Triton.

    Halves are multiplied as they are, which is exact, and summed in float32.

    Args:
        rows: [B, N, d] of float32, float16 or bfloat16, any strides.
        ones: whether a constant 1 ends each row.
        pieces: number of equal diagonal blocks.
        scale: factor of the sum.
        parts: into how many sums the rows are cut; None for what fills the device.

    Returns:
        float32 [B * pieces, s * (s + 1) / 2] for blocks of s rows.

    Raises:
        ArgumentError: the pieces are unequal.
    """
    batch, count, width = rows.shape
    size = piece_size(width, ones, pieces)
    side = triton.cdiv(size, TILE)
    grid = side * (side + 1) // 2, batch * pieces
    if parts is None:
        parts = splits_for(rows, grid[0] * grid[1], count, 8 * STEP)
    part_rows = triton.cdiv(triton.cdiv(count, parts), STEP) * STEP
    out = rows.new_empty(parts, batch * pieces, packed_length(size), dtype=torch.float32)
    syrk_kernel[(*grid, parts)](
        rows, out, count, width, size, pieces, *rows.stride(), part_rows, out.stride(0), scale,
        ONES=ones, TILE=TILE, STEP=STEP,
    )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]
