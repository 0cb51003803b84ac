"""The kernels in Triton's interpreter against the reference; prints one error per case as JSON.

A process of its own, as the interpreter is chosen when Triton is imported:
``TRITON_INTERPRET=1 python -m tests.support.interpreted_kernels``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphopt.ops import moments, moments_patch, moments_shift
from graphopt.ops.moments_window import PatchArguments, Window
from graphopt.runtime.kernels import dispatch
from graphopt.runtime.kernels.shift import correlate
from graphopt.runtime.kernels.syrk import syrk

Case = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]
# The interpreter multiplies the bits of bfloat16 as integers, so that type is only compiled.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def products() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        rows = normal(2, 37, 5, dtype=dtype)
        yield (
            f"syrk {name}",
            lambda rows=rows: syrk(rows, True, 1, 0.5),
            lambda rows=rows: moments.second_moment(rows, True, 1, 0.5),
        )
    wide = normal(1, 9, 131)
    for name, ones, pieces in (
        ("several tiles", False, 1),
        ("pieces", True, 2),
        ("all", True, 132),
    ):
        yield (
            f"syrk {name}",
            lambda ones=ones, pieces=pieces: syrk(wide, ones, pieces, 1.0),
            lambda ones=ones, pieces=pieces: moments.second_moment(wide, ones, pieces, 1.0),
        )
    rows = normal(3, 7, 150).permute(1, 2, 0)[:, ::2]
    yield (
        "syrk strides and parts",
        lambda: syrk(rows, True, 1, 1.0, parts=3),
        lambda: moments.second_moment(rows, True, 1, 1.0),
    )
    yield (
        "syrk without rows",
        lambda: syrk(rows[:, :0], True, 1, 1.0),
        lambda: moments.second_moment(rows[:, :0], True, 1, 1.0),
    )


def correlations() -> Iterator[Case]:
    for rank, kernel, dilation, groups in (
        (1, [3], [2], 1),
        (2, [3, 2], [1, 2], 2),
        (2, [2, 3], [1, 1], 1),
        (3, [2, 1, 2], [1, 1, 1], 1),
    ):
        window = Window.of(kernel, [1], [1], dilation, False, [0])
        box = ((2, 5), (1, 4), (0, 3))[:rank]
        for name, dtype in DTYPES.items():
            plane = normal(2, 4, 12, 9, 8, dtype=dtype)
            while plane.dim() > rank + 2:
                plane = plane[..., 1]
            yield (
                f"correlation {kernel} {name}",
                lambda plane=plane, window=window, box=box, groups=groups: correlate(
                    plane, box, window, groups, parts=2
                ),
                lambda plane=plane, window=window, box=box, groups=groups: (
                    moments_shift.by_convolution(plane, box, window, groups)
                ),
            )
    window = Window.of([2], [1], [0], [1], False, [0])
    plane = normal(1, 70, 6)
    yield (
        "correlation several tiles",
        lambda: correlate(plane, ((0, 4),), window, 1),
        lambda: moments_shift.by_convolution(plane, ((0, 4),), window, 1),
    )


def whole() -> Iterator[Case]:
    """What `torch.ops.graphopt` calls on CUDA, against copied patches."""
    x = normal(2, 4, 5, 4)
    for name, arguments, groups, ones, pieces in (
        ("same", ([3, 3], [1, 1], [1, 1], [1, 1], False, [0, 0]), 2, True, 1),
        ("pieces", ([3, 2], [1, 1], [1, 0], [1, 1], False, [0, 0]), 1, False, 2),
        ("transposed", ([2, 2], [1, 1], [1, 0], [1, 1], True, [0, 0]), 1, True, 1),
        ("strided", ([3, 3], [2, 2], [1, 1], [1, 1], False, [0, 0]), 1, True, 1),
    ):
        given = (*arguments[:4], groups, *arguments[4:], ones, pieces, 0.5)
        args = PatchArguments.of(*given)
        yield (
            f"patches {name}",
            lambda given=given: dispatch.patch_moment(x, *given),
            lambda args=args: moments_patch.by_patches(x, args),
        )
    yield (
        "rows of float64",
        lambda: dispatch.second_moment(normal(1, 5, 3).double(), True, 1, 1.0),
        lambda: moments.second_moment(normal(1, 5, 3).double(), True, 1, 1.0),
    )


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; infinite for another shape or dtype."""
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [*products(), *correlations(), *whole()]
    print(json.dumps({name: error(run(), reference()) for name, run, reference in cases}))
