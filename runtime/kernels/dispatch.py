"""Which calls of the moment operators go to which kernel on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.ops import moments, moments_patch, moments_shift
from graphopt.ops.moments_window import PatchArguments
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


def patch_moment(x: Tensor, *arguments: Any) -> Tensor:
    """`graphopt.ops.moments.patch_moment`, by correlations where the window moves by single steps.

    Other windows, float64 and pieces that cut through channels go to the reference.
    """
    args = PatchArguments.of(*arguments)
    if (
        moments_shift.possible(args.window)
        and x.dtype is not torch.float64
        and moments_shift.divides(x, args)
    ):
        return moments_patch.by_shifts(x, args, correlate)
    return moments_patch.patch_moment(x, args)
