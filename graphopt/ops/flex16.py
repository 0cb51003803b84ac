"""Sixteen-bit integers with one exponent per tensor, from the tensor's own magnitude.

    flex16_quantise(Tensor x) -> (Tensor mantissas, Tensor scale)
    flex16_dequantise(Tensor mantissas, Tensor scale) -> Tensor

`graphopt::flex_quantise` with the exponent that it chooses itself ("current scaling"), and that
exponent as a float32 factor, so that a tensor can be read back without its statistics. Nothing
saturates then, and an element is off by at most 2^-15 of the largest one.

Nothing is silent: mantissas have no NaN, so where an element is NaN or infinite the scale is NaN,
and with it the whole tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.flex import UNKNOWN, power_of_two
from graphopt.ops.unrounded import declare, kept, read

MANTISSA = 16

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("flex16_quantise(Tensor x) -> (Tensor mantissas, Tensor scale)")
_library.define("flex16_dequantise(Tensor mantissas, Tensor scale) -> Tensor")


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    unknown = torch.full((), UNKNOWN, dtype=torch.int32, device=x.device)
    mantissas, statistics = torch.ops.graphopt.flex_quantise(x, unknown, MANTISSA)
    _, infinite, nan, exponent = statistics.unbind()
    # Without an exponent all mantissas are 0, and any scale will do.
    scale = torch.where(infinite + nan > 0, math.nan, power_of_two(exponent))
    return mantissas, scale


def _dequantise(mantissas: Tensor, scale: Tensor) -> Tensor:
    values = torch.empty_like(mantissas, dtype=torch.float32)
    return torch.mul(mantissas.to(torch.float32), scale, out=values)


def _fake_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int16), x.new_empty(())


def _fake_dequantise(mantissas: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(mantissas, dtype=torch.float32)


for _name, _kernel, _fake in (
    ("flex16_quantise", _quantise, _fake_quantise),
    ("flex16_dequantise", _dequantise, _fake_dequantise),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
declare({"flex16_quantise": kept, "flex16_dequantise": read})
