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
from graphopt.ops.moments_window import PatchArguments, pad
from graphopt.ops.packing import pack


def patch_width(x: Tensor, args: PatchArguments) -> int:
    """Entries of a patch.

    Raises:
        ArgumentError: the input does not fit the kernel or the groups.
    """
    kernel, groups = args.window.kernel, args.groups
    if x.dim() != len(kernel) + 2 or groups < 1 or x.shape[1] % groups:
        raise ArgumentError(
            f"an input of shape {tuple(x.shape)} does not fit a convolution with a kernel of shape "
            f"{list(kernel)} in {groups} groups",
            hint="pass [batch, channels, *spatial] with channels divisible by groups",
        )
    return x.shape[1] // groups * math.prod(kernel)


def patch_moment(x: Tensor, args: PatchArguments) -> Tensor:
    """``scale * Σ p pᵀ`` over all patches p, by the faster of two exact ways (see `shift.pays`).

    Returns:
        [groups * pieces, s * (s + 1) / 2] with patches cut into pieces of s entries.
    """
    patch_width(x, args)
    if shift.pays(x, args.window, args.groups) and shift.divides(x, args):
        return by_shifts(x, args, shift.by_convolution)
    return by_patches(x, args)


def by_patches(x: Tensor, args: PatchArguments) -> Tensor:
    """`patch_moment` from copied patches, a few images at a time."""
    width = patch_width(x, args)
    like = x.new_empty(args.groups, 0, dtype=rows_.working_dtype(x))
    parts = patches(x, args, rows_.WORKSPACE)
    return rows_.moment(parts, like, width, args.ones, args.pieces, args.scale)


def patches(x: Tensor, args: PatchArguments, most: int) -> Iterator[Tensor]:
    """All patches as rows [groups, positions of some images, width], in at least float32.

    Args:
        x: input of the convolution.
        args: its geometry.
        most: numbers of one part, as far as one image has no more.
    """
    window, groups, width = args.window, args.groups, patch_width(x, args)
    outputs = window.outputs(x.shape[2:])
    dtype = rows_.working_dtype(x)
    step = max(1, most // max(1, groups * width * math.prod(outputs)))
    for images in torch.split(x, step):
        found = window.windows(window.padded(images.to(dtype)), outputs)
        # [groups, channel and offset, image and position]: positions stay side by side.
        yield found.movedim(0, 1 + len(outputs)).reshape(groups, width, -1).mT


def by_shifts(x: Tensor, args: PatchArguments, correlate: shift.Correlate) -> Tensor:
    """`patch_moment` of a window of step 1 from correlations of the plane with itself."""
    window, groups, width = args.window, args.groups, patch_width(x, args)
    rows_.piece_size(width, args.ones, args.pieces)
    outputs = window.outputs(x.shape[2:])
    plane = window.plane(x)
    # Pieces of whole channels are groups of their own.
    matrices = shift.gram(
        pad(plane, shift.widened(window)), window, outputs, groups * args.pieces, correlate
    )
    packed = pack(matrices)
    if args.ones:
        total = pad(plane.sum(0, dtype=packed.dtype), window.margins())
        sums = _over_positions(window.windows(total, outputs), len(outputs))
        count = x.shape[0] * math.prod(outputs)
        packed = rows_.with_ones(packed, sums.reshape(groups, width), count)
    return packed.mul_(args.scale)


def patch_diagonal(x: Tensor, args: PatchArguments) -> Tensor:
    """The diagonal of `patch_moment` in one piece: [groups, width (+ 1)]."""
    window, groups, width = args.window, args.groups, patch_width(x, args)
    outputs = window.outputs(x.shape[2:])
    dtype = rows_.working_dtype(x)
    squares = x.new_zeros(x.shape[1:], dtype=dtype)
    step = max(1, rows_.WORKSPACE // max(1, squares.numel()))
    for images in torch.split(x, step):
        squares += images.to(dtype).square().sum(0)
    windows = window.windows(window.padded(squares), outputs)
    diagonal = _over_positions(windows, len(outputs)).reshape(groups, width)
    if args.ones:
        count = x.shape[0] * math.prod(outputs)
        diagonal = torch.cat([diagonal, diagonal.new_full((groups, 1), count)], 1)
    return diagonal.mul_(args.scale)


def _over_positions(windows: Tensor, rank: int) -> Tensor:
    return windows.sum(tuple(range(-rank, 0)))
