"""Exact int16 products on tensor cores that multiply int8: each number in two halves.

With ``a = 256 h + l + 128`` for ``h = a >> 8`` and ``l = (a & 255) - 128``, both int8 over the full
range, ``Σ a b`` is ``2^16 Σ hh' + 2^8 Σ (hl' + lh') + Σ ll'`` of the halves, plus
``128 (Σ a + Σ b) - 2^14 K`` for K terms. Sums of halves are exact in int32 for up to 65,535 terms
(two products of at most 2^14 each), and are then added in int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.ops import int16_mm as reference
from graphopt.runtime.kernels.launch import splits_for

# Side of a tile, and terms of one step; int8 tensor cores take at least 32.
TILE = 64
STEP = 64
# The most terms below 65,536 in whole steps.
EXACT_IN_INT32 = 65_535 // STEP * STEP


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def product_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    out,
    rows,
    columns,
    terms,
    part_terms,
    left_half,
    right_half,
    part_stride,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of ``Σ (256 h + l) (256 h' + l')`` over some terms."""
    tiles = tl.cdiv(columns, TILE)
    row = (tl.program_id(0) // tiles) * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    part = tl.program_id(1)
    # The terms of both lie side by side in memory, as int8 tensor cores need them.
    of_left = left + row[:, None].to(tl.int64) * terms
    of_right = right + column[None, :].to(tl.int64) * terms

    total = tl.zeros((TILE, TILE), dtype=tl.int64)
    first = part * part_terms
    stop = tl.minimum(first + part_terms, terms)
    for chunk in range(first, stop, CHUNK):
        high = tl.zeros((TILE, TILE), dtype=tl.int32)
        middle = tl.zeros((TILE, TILE), dtype=tl.int32)
        low = tl.zeros((TILE, TILE), dtype=tl.int32)
        for at in range(chunk, tl.minimum(chunk + CHUNK, stop), STEP):
            term = at + tl.arange(0, STEP)
            a = of_left + term[None, :]
            b = of_right + term[:, None]
            is_a = (row < rows)[:, None] & (term < stop)[None, :]
            is_b = (column < columns)[None, :] & (term < stop)[:, None]
            a_high = tl.load(a, mask=is_a, other=0)
            a_low = tl.load(a + left_half, mask=is_a, other=0)
            b_high = tl.load(b, mask=is_b, other=0)
            b_low = tl.load(b + right_half, mask=is_b, other=0)
            high = tl.dot(a_high, b_high, high, out_dtype=tl.int32)
            middle = tl.dot(a_high, b_low, middle, out_dtype=tl.int32)
            middle = tl.dot(a_low, b_high, middle, out_dtype=tl.int32)
            low = tl.dot(a_low, b_low, low, out_dtype=tl.int32)
        total += (high.to(tl.int64) << 16) + (middle.to(tl.int64) << 8) + low.to(tl.int64)

    place = row[:, None].to(tl.int64) * columns + column[None, :]
    stored = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + part.to(tl.int64) * part_stride + place, total, mask=stored)


def int16_mm(
    a: Tensor, b: Tensor, *, parts: int | None = None, chunk: int = EXACT_IN_INT32
) -> Tensor:
    """`graphopt.ops.int16_mm.int16_mm` by Triton.

    Args:
        a: int16 [m, k], any strides.
        b: int16 [k, n], any strides.
        parts: into how many sums the terms are cut; None for what fills the device.
        chunk: terms that are summed in int32, whole steps up to `EXACT_IN_INT32`.

    Returns:
        int64 [m, n].

    Raises:
        ArgumentError: these cannot be multiplied.
    """
    reference.check(a, b)
    (rows, terms), columns = a.shape, b.shape[1]
    if not (rows and columns and terms):
        return torch.zeros(rows, columns, dtype=torch.int64, device=a.device)
    left, right = halves(a), halves(b.t())
    tiles = triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE)
    if parts is None:
        parts = splits_for(a, tiles, terms, 8 * STEP)
    part_terms = triton.cdiv(triton.cdiv(terms, parts), STEP) * STEP
    out = a.new_empty(parts, rows, columns, dtype=torch.int64)
    product_kernel[(tiles, parts)](
        left, right, out, rows, columns, terms, part_terms,
        left.stride(0), right.stride(0), out.stride(0),
        CHUNK=chunk, TILE=TILE, STEP=STEP,
    )  # fmt: skip
    total = out.sum(0) if parts > 1 else out[0]
    sums = a.sum(1, dtype=torch.int64)[:, None] + b.sum(0, dtype=torch.int64)
    return total.add_(sums, alpha=128).sub_(terms << 14)


def halves(matrix: Tensor) -> Tensor:
    """int8 [2, rows, terms], dense: ``m >> 8`` and ``(m & 255) - 128`` of an int16 matrix."""
    parts = torch.empty(2, *matrix.shape, dtype=torch.int8, device=matrix.device)
    parts[0].copy_(matrix >> 8)
    parts[1].copy_((matrix & 255) - 128)
    return parts
