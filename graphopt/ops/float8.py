"""Float8 with one float32 scale per tensor or per row, from the tensor's own magnitude.

    float8_quantise(Tensor x, ScalarType dtype, int? axis, bool power_of_two)
        -> (Tensor values, Tensor scale)
    float8_dequantise(Tensor values, Tensor scale) -> Tensor

These are the casts of torchao's recipes for training (`torchao.float8`, dynamic scaling), with the
same bits: ``scale = largest / max(amax, 1e-12)``, divided in float64 and rounded to float32;
``values = clamp(x * scale)`` to nearest even. `axis` is the one that the scale runs along, the
contracted axis of a product: the scale has size 1 there. Without an axis it has no dimension.
`power_of_two` rounds the scale down to a power of two; ours takes it from its bits.

Unless the scale is a power of two, the product ``x * scale`` is rounded to float32 before it is
rounded to float8, as in torchao.

Nothing is silent: NaN or infinity in what shares a scale makes all of it NaN, by a scale that is
NaN or 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops.unrounded import declare, kept, read

# Smaller magnitudes do not get a larger scale.
LEAST_MAGNITUDE = 1e-12
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_EXPONENT_BITS = 0x7F800000

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "float8_quantise(Tensor x, ScalarType dtype, int? axis, bool power_of_two) "
    "-> (Tensor values, Tensor scale)"
)
_library.define("float8_dequantise(Tensor values, Tensor scale) -> Tensor")


def _quantise(
    x: Tensor, dtype: torch.dtype, axis: int | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    _check(x, dtype, axis)
    largest = torch.finfo(dtype).max
    scale = (largest / _magnitude(x, axis).double().clamp(min=LEAST_MAGNITUDE)).float()
    if power_of_two:
        down = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
        scale = torch.where(scale.isfinite(), down, scale)
    scaled = (x * scale).clamp_(-largest, largest)
    return torch.empty_like(x, dtype=dtype).copy_(scaled), scale


def _dequantise(values: Tensor, scale: Tensor) -> Tensor:
    # 0 / 0 is the NaN of what was infinite.
    return torch.empty_like(values, dtype=torch.float32).copy_(values.to(torch.float32) / scale)


def _magnitude(x: Tensor, axis: int | None) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros(_shape(x, axis))
    return x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)


def _shape(x: Tensor, axis: int | None) -> list[int]:
    if axis is None:
        return []
    shape = list(x.shape)
    shape[axis] = 1
    return shape


def _check(x: Tensor, dtype: torch.dtype, axis: int | None) -> None:
    if x.dtype is not torch.float32:
        raise ArgumentError(
            f"float8 is made of float32, not {x.dtype}", hint="convert it to float32 before"
        )
    if dtype not in DTYPES:
        raise ArgumentError(
            f"{dtype} is no float8 format", hint=f"pass one of {', '.join(map(str, DTYPES))}"
        )
    if axis is not None and not -x.dim() <= axis < x.dim():
        raise ArgumentError(
            f"axis={axis} is not one of the {x.dim()} axes of the tensor",
            hint="pass the contracted axis, or none for one scale",
        )


def _fake_quantise(
    x: Tensor, dtype: torch.dtype, axis: int | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    _check(x, dtype, axis)
    return torch.empty_like(x, dtype=dtype), x.new_empty(_shape(x, axis))


def _fake_dequantise(values: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.float32)


for _name, _kernel, _fake in (
    ("float8_quantise", _quantise, _fake_quantise),
    ("float8_dequantise", _dequantise, _fake_dequantise),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
declare({"float8_quantise": kept, "float8_dequantise": read})
