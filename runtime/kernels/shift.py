"""Correlation of an image with itself, the work of a convolution's moment on a GPU.

See `graphopt.ops.moments_shift` for what is summed and why. No patch is ever in memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.ops.moments_shift import Box, differences
from graphopt.ops.moments_window import Window
from graphopt.runtime.kernels.launch import splits_for

# Positions that one step of a program multiplies; the smallest and largest side of a tile.
STEP = 32
LEAST_TILE = 16
LARGEST_TILE = 64


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["start0", "start1", "start2", "extent0", "extent1", "extent2", "part_length"]
)
def correlation_kernel(  # type: ignore[no-untyped-def]
    plane,
    out,
    positions,
    channels,
    shifts,
    image_stride,
    channel_stride,
    stride0,
    stride1,
    stride2,
    start0,
    start1,
    start2,
    extent0,
    extent1,
    extent2,
    dilation0,
    dilation1,
    dilation2,
    part_length,
    part_stride,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of channel pairs at one difference, over some positions of all images."""
    tiles = tl.cdiv(channels, TILE)
    number = tl.program_id(0)
    group = tl.program_id(1) // shifts
    shift = tl.program_id(1) % shifts
    part = tl.program_id(2)

    # Along the first dimension differences count from 0, along the others from the most negative.
    shift2 = shift % (2 * KERNEL2 - 1) - (KERNEL2 - 1)
    shift1 = (shift // (2 * KERNEL2 - 1)) % (2 * KERNEL1 - 1) - (KERNEL1 - 1)
    shift0 = shift // ((2 * KERNEL2 - 1) * (2 * KERNEL1 - 1))
    ahead = (
        shift0.to(tl.int64) * dilation0 * stride0
        + shift1.to(tl.int64) * dilation1 * stride1
        + shift2.to(tl.int64) * dilation2 * stride2
    )

    left = (number // tiles) * TILE + tl.arange(0, TILE)
    right = (number % tiles) * TILE + tl.arange(0, TILE)
    base = plane + group.to(tl.int64) * channels * channel_stride
    left_pointers = base + left[:, None].to(tl.int64) * channel_stride
    right_pointers = base + right[None, :].to(tl.int64) * channel_stride + ahead

    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    first = part * part_length
    stop = tl.minimum(first + part_length, positions)
    for at in range(first, stop, STEP):
        position = at + tl.arange(0, STEP)
        present = position < stop
        u2 = position % extent2 + start2
        u1 = (position // extent2) % extent1 + start1
        u0 = (position // (extent2 * extent1)) % extent0 + start0
        image = position // (extent2 * extent1 * extent0)
        offsets = (
            image.to(tl.int64) * image_stride
            + u0.to(tl.int64) * stride0
            + u1.to(tl.int64) * stride1
            + u2.to(tl.int64) * stride2
        )
        a = tl.load(
            left_pointers + offsets[None, :],
            mask=(left < channels)[:, None] & present[None, :],
            other=0.0,
        )
        b = tl.load(
            right_pointers + offsets[:, None],
            mask=(right < channels)[None, :] & present[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")

    row = group.to(tl.int64) * channels + left[:, None]
    place = (row * channels + right[None, :]) * shifts + shift
    stored = (left < channels)[:, None] & (right < channels)[None, :]
    tl.store(out + part.to(tl.int64) * part_stride + place, total, mask=stored)


def correlate(
    plane: Tensor, box: Box, window: Window, groups: int, *, parts: int | None = None
) -> Tensor:
    """`graphopt.ops.moments_shift.by_convolution` by Triton.

    Args:
        plane: widened plane [n, C, *spatial] of float32, float16 or bfloat16, any strides.
        box: first and last-but-one position along each of one to three dimensions.
        window: one that moves by single steps.
        groups: number of independent sets of channels.
        parts: into how many sums the positions are cut; None for what fills the device.

    Returns:
        float32 [groups, c, c', *differences] with c = C / groups.
    """
    rank = len(window.kernel)
    missing = 3 - rank
    channels = plane.shape[1] // groups
    shape = differences(window.kernel)
    # Appended, so that the first dimension, which has only half of the differences, stays first.
    kernel = (*window.kernel, *[1] * missing)
    dilation = (*window.dilation, *[1] * missing)
    strides = (*plane.stride(), *[0] * missing)
    before = (0, *window.reach[1:], *[0] * missing)
    sides = (*box, *[(0, 1)] * missing)
    starts = [start + room for (start, _), room in zip(sides, before, strict=True)]
    extents = [stop - start for start, stop in sides]

    positions = plane.shape[0] * math.prod(extents)
    shifts = math.prod(shape)
    tile = min(LARGEST_TILE, max(LEAST_TILE, triton.next_power_of_2(channels)))
    grid = triton.cdiv(channels, tile) ** 2, groups * shifts
    if parts is None:
        parts = splits_for(plane, grid[0] * grid[1], positions, 8 * STEP)
    part_length = triton.cdiv(triton.cdiv(positions, parts), STEP) * STEP
    out = plane.new_empty(parts, groups, channels, channels, *shape, dtype=torch.float32)
    correlation_kernel[(*grid, parts)](
        plane, out, positions, channels, shifts, *strides, *starts, *extents, *dilation,
        part_length, out.stride(0),
        KERNEL1=kernel[1], KERNEL2=kernel[2], TILE=tile, STEP=STEP,
    )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]
