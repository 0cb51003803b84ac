"""Which calls of the moment operators go to which kernel on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.ops import moments, moments_patch, moments_shift
from graphopt.ops.moments_window import Window
from graphopt.runtime.kernels.shift import correlate
from graphopt.runtime.kernels.syrk import syrk

_kept: list[Any] = []


def register() -> None:
    """Registers the kernels; torch raises when it is called twice in a process."""
    library: Any = torch.library.Library("graphopt", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    library.impl("second_moment", second_moment)
    library.impl("patch_moment", patch_moment)
    _kept.append(library)  # The registration lasts as long as the library object.


def second_moment(rows: Tensor, ones: bool, pieces: int, scale: float) -> Tensor:
    """`graphopt.ops.moments.second_moment`; float64 and bad input go to the reference."""
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16) or rows.dim() != 3:
        return moments.second_moment(rows, ones, pieces, scale)
    return syrk(rows, ones, pieces, scale)


def patch_moment(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    ones: bool,
    pieces: int,
    scale: float,
) -> Tensor:
    """`graphopt.ops.moments.patch_moment`, by correlations where the window moves by single steps.

    Other windows, float64 and pieces that cut through channels go to the reference.
    """
    window = Window.of(kernel, stride, padding, dilation, transposed, output_padding)
    if (
        moments_shift.possible(window)
        and x.dtype is not torch.float64
        and moments_shift.divides(x, groups, ones, pieces)
    ):
        return moments_patch.by_shifts(x, window, groups, ones, pieces, scale, correlate)
    return moments_patch.patch_moment(x, window, groups, ones, pieces, scale)
