"""Second moments of layer inputs and output gradients: the statistics of K-FAC.

    second_moment(Tensor rows, bool ones, int pieces, Scalar scale) -> Tensor
    diagonal_moment(Tensor rows, bool ones, Scalar scale) -> Tensor
    patch_moment(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,
        bool transposed, int[] output_padding, bool ones, int pieces, Scalar scale) -> Tensor
    patch_diagonal_moment(... the same without pieces ...) -> Tensor
    token_counts(Tensor indices, int size, int padding_idx, Scalar scale) -> Tensor
    norm_moment(Tensor grad, Tensor x, Tensor? mean, Tensor rstd, SymInt[] statistics_shape,
        int[] parameter_shape, bool shift, Scalar scale) -> Tensor

`ones` appends a constant 1 to every row, the homogeneous coordinate of a bias. `pieces` cuts the
matrix into that many equal diagonal blocks. Symmetric matrices are returned as their lower
triangles, row by row. Results are float64 for float64 inputs and float32 for all others; halves
are cast before they are multiplied. Operators run without autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops import moments_patch as patch
from graphopt.ops import moments_rows as rows_
from graphopt.ops.moments_norm import norm_moment
from graphopt.ops.moments_window import PatchArguments
from graphopt.ops.packing import packed_length

_WINDOW = (
    "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool transposed, "
    "int[] output_padding"
)
# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "second_moment(Tensor rows, bool ones, int pieces, Scalar scale) -> Tensor",
    "diagonal_moment(Tensor rows, bool ones, Scalar scale) -> Tensor",
    f"patch_moment(Tensor x, {_WINDOW}, bool ones, int pieces, Scalar scale) -> Tensor",
    f"patch_diagonal_moment(Tensor x, {_WINDOW}, bool ones, Scalar scale) -> Tensor",
    "token_counts(Tensor indices, int size, int padding_idx, Scalar scale) -> Tensor",
    "norm_moment(Tensor grad, Tensor x, Tensor? mean, Tensor rstd, SymInt[] statistics_shape, "
    "int[] parameter_shape, bool shift, Scalar scale) -> Tensor",
):
    _library.define(_schema)


def second_moment(rows: Tensor, ones: bool, pieces: int, scale: float) -> Tensor:
    """``scale * Σ_n r_n r_nᵀ``.

    Args:
        rows: [B, N, d], any strides.
        ones: whether a constant 1 ends each row.
        pieces: number of equal diagonal blocks, a divisor of d, or d + 1 with `ones`.
        scale: factor of the sum.

    Returns:
        [B * pieces, s * (s + 1) / 2] for blocks of s rows.

    Raises:
        ArgumentError: wrong rank or dtype, or the pieces are unequal.
    """
    _check_rows(rows)
    dtype = rows_.working_dtype(rows)
    like = rows.new_empty(rows.shape[0], 0, dtype=dtype)
    return rows_.moment(rows_.in_steps(rows), like, rows.shape[2], ones, pieces, scale)


def diagonal_moment(rows: Tensor, ones: bool, scale: float) -> Tensor:
    """The diagonal of `second_moment` in one piece: [B, d], or [B, d + 1] with `ones`."""
    _check_rows(rows)
    batch, count, width = rows.shape
    total = rows.new_zeros(batch, width + int(ones), dtype=rows_.working_dtype(rows))
    step = max(1, rows_.WORKSPACE // max(1, batch * width))
    for part in torch.split(rows, step, 1):
        total[:, :width] += part.to(total.dtype).square().sum(1)
    if ones:
        total[:, width] = count
    return total.mul_(scale)


def token_counts(indices: Tensor, size: int, padding_idx: int, scale: float) -> Tensor:
    """How often each index occurs: the diagonal input moment of an embedding.

    Args:
        indices: integers in [0, size), any shape.
        size: rows of the embedding.
        padding_idx: an index that is not counted; negative for none.
        scale: factor of the counts.

    Returns:
        float32 [1, size].

    Raises:
        ArgumentError: the indices are not integers.
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype is torch.bool:
        raise ArgumentError(
            f"tokens are counted by integer indices, not by {indices.dtype}",
            hint="pass the indices of the embedding",
        )
    flat = indices.reshape(-1).to(torch.int64)
    # Integers: exact beyond 2^24, and independent of the order in which a GPU adds.
    counts = flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))
    if 0 <= padding_idx < size:
        counts[padding_idx] = 0
    return counts.to(torch.float32).mul_(scale).unsqueeze(0)


def patch_moment(x: Tensor, *arguments: Any) -> Tensor:
    """`second_moment` of the patches of a convolution, without copying them where that is faster.

    Args:
        x: input of the convolution, [n, C, *spatial] of one to three dimensions.
        arguments: as of `PatchArguments.of`.

    Returns:
        [groups * pieces, s * (s + 1) / 2] in the order (channel, kernel offset).

    Raises:
        ArgumentError: shapes do not fit, or the pieces are unequal.
    """
    return patch.patch_moment(x, PatchArguments.of(*arguments))


def patch_diagonal_moment(x: Tensor, *arguments: Any) -> Tensor:
    """The diagonal of `patch_moment` in one piece: [groups, d], or [groups, d + 1] with `ones`."""
    return patch.patch_diagonal(x, _in_one_piece(*arguments))


def _in_one_piece(*arguments: Any) -> PatchArguments:
    *window, ones, scale = arguments
    return PatchArguments.of(*window, ones, 1, scale)


def _check_rows(rows: Tensor) -> None:
    if rows.dim() != 3:
        raise ArgumentError(
            f"rows have shape [batch, rows, columns], not {tuple(rows.shape)}",
            hint="reshape them, with a batch of 1 where there is a single matrix",
        )


def _fake_second_moment(rows: Tensor, ones: bool, pieces: int, scale: float) -> Tensor:
    _check_rows(rows)
    size = rows_.piece_size(rows.shape[2], ones, pieces)
    shape = (rows.shape[0] * pieces, packed_length(size))
    return rows.new_empty(shape, dtype=rows_.working_dtype(rows))


def _fake_diagonal_moment(rows: Tensor, ones: bool, scale: float) -> Tensor:
    _check_rows(rows)
    shape = (rows.shape[0], rows.shape[2] + int(ones))
    return rows.new_empty(shape, dtype=rows_.working_dtype(rows))


def _fake_patch_moment(x: Tensor, *arguments: Any) -> Tensor:
    args = PatchArguments.of(*arguments)
    size = rows_.piece_size(patch.patch_width(x, args), args.ones, args.pieces)
    return x.new_empty(
        (args.groups * args.pieces, packed_length(size)), dtype=rows_.working_dtype(x)
    )


def _fake_patch_diagonal_moment(x: Tensor, *arguments: Any) -> Tensor:
    args = _in_one_piece(*arguments)
    shape = (args.groups, patch.patch_width(x, args) + int(args.ones))
    return x.new_empty(shape, dtype=rows_.working_dtype(x))


def _fake_token_counts(indices: Tensor, size: int, padding_idx: int, scale: float) -> Tensor:
    return indices.new_empty((1, size), dtype=torch.float32)


def _fake_norm_moment(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    statistics_shape: Sequence[int],
    parameter_shape: Sequence[int],
    shift: bool,
    scale: float,
) -> Tensor:
    shape = (math.prod(parameter_shape), 3 if shift else 1)
    return x.new_empty(shape, dtype=rows_.working_dtype(x))


for _name, _kernel, _fake in (
    ("second_moment", second_moment, _fake_second_moment),
    ("diagonal_moment", diagonal_moment, _fake_diagonal_moment),
    ("patch_moment", patch_moment, _fake_patch_moment),
    ("patch_diagonal_moment", patch_diagonal_moment, _fake_patch_diagonal_moment),
    ("token_counts", token_counts, _fake_token_counts),
    ("norm_moment", norm_moment, _fake_norm_moment),
):
    # One kernel for every device; `graphopt.runtime.kernels` brings faster ones for some.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
