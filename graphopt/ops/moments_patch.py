"""Moments of the patches that a convolution multiplies its weight with.

The patch of an output position holds, for each input channel c of a group and each kernel offset k,
the input value that the weight's entry (c, k) is multiplied with there, and 0 in the padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops import moments_rows as rows_
from graphopt.ops import moments_shift as shift
from graphopt.ops.moments_window import Window, pad
from graphopt.ops.packing import pack


def patch_width(x: Tensor, window: Window, groups: int) -> int:
    """Entries of a patch.

    Raises:
        ArgumentError: the input does not fit the kernel or the groups.
    """
    if x.dim() != len(window.kernel) + 2 or groups < 1 or x.shape[1] % groups:
        raise ArgumentError(
            f"an input of shape {tuple(x.shape)} does not fit a convolution with a kernel of shape "
            f"{list(window.kernel)} in {groups} groups",
            hint="pass [batch, channels, *spatial] with channels divisible by groups",
        )
    return x.shape[1] // groups * math.prod(window.kernel)


def patch_moment(
    x: Tensor, window: Window, groups: int, ones: bool, pieces: int, scale: float
) -> Tensor:
    """``scale * Σ p pᵀ`` over all patches p, by the faster of two exact ways (see `shift.pays`).

    Returns:
        [groups * pieces, s * (s + 1) / 2] with patches cut into pieces of s entries.
    """
    patch_width(x, window, groups)
    if shift.pays(x, window, groups) and shift.divides(x, groups, ones, pieces):
        return by_shifts(x, window, groups, ones, pieces, scale, shift.by_convolution)
    return by_patches(x, window, groups, ones, pieces, scale)


def by_patches(
    x: Tensor, window: Window, groups: int, ones: bool, pieces: int, scale: float
) -> Tensor:
    """`patch_moment` from copied patches, a few images at a time."""
    width = patch_width(x, window, groups)
    outputs = window.outputs(x.shape[2:])
    dtype = rows_.working_dtype(x)
    step = max(1, rows_.WORKSPACE // max(1, groups * width * math.prod(outputs)))

    def parts() -> Iterator[Tensor]:
        for images in torch.split(x, step):
            patches = window.windows(window.padded(images.to(dtype)), outputs)
            # [groups, channel and offset, image and position]: positions stay side by side.
            yield patches.movedim(0, 1 + len(outputs)).reshape(groups, width, -1).mT

    like = x.new_empty(groups, 0, dtype=dtype)
    return rows_.moment(parts(), like, width, ones, pieces, scale)


def by_shifts(
    x: Tensor,
    window: Window,
    groups: int,
    ones: bool,
    pieces: int,
    scale: float,
    correlate: shift.Correlate,
) -> Tensor:
    """`patch_moment` of a window of step 1 from correlations of the plane with itself."""
    width = patch_width(x, window, groups)
    rows_.piece_size(width, ones, pieces)
    outputs = window.outputs(x.shape[2:])
    plane = window.plane(x)
    # Pieces of whole channels are groups of their own.
    matrices = shift.gram(
        pad(plane, shift.widened(window)), window, outputs, groups * pieces, correlate
    )
    packed = pack(matrices)
    if ones:
        total = pad(plane.sum(0, dtype=packed.dtype), window.margins())
        sums = _over_positions(window.windows(total, outputs), len(outputs))
        count = x.shape[0] * math.prod(outputs)
        packed = rows_.with_ones(packed, sums.reshape(groups, width), count)
    return packed.mul_(scale)


def patch_diagonal(x: Tensor, window: Window, groups: int, ones: bool, scale: float) -> Tensor:
    """The diagonal of `patch_moment` in one piece: [groups, width (+ 1)]."""
    width = patch_width(x, window, groups)
    outputs = window.outputs(x.shape[2:])
    dtype = rows_.working_dtype(x)
    squares = x.new_zeros(x.shape[1:], dtype=dtype)
    step = max(1, rows_.WORKSPACE // max(1, squares.numel()))
    for images in torch.split(x, step):
        squares += images.to(dtype).square().sum(0)
    windows = window.windows(window.padded(squares), outputs)
    diagonal = _over_positions(windows, len(outputs)).reshape(groups, width)
    if ones:
        count = x.shape[0] * math.prod(outputs)
        diagonal = torch.cat([diagonal, diagonal.new_full((groups, 1), count)], 1)
    return diagonal.mul_(scale)


def _over_positions(windows: Tensor, rank: int) -> Tensor:
    return windows.sum(tuple(range(-rank, 0)))
