"""The MXFP8 format: float8 elements in blocks of 32 that share a power of two.

    mx_quantise(Tensor x, int axis, str scaling) -> (Tensor values, Tensor scales)
    mx_dequantise(Tensor values, Tensor scales, int axis) -> Tensor

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.2 and 6.3. Elements are
float8_e4m3fn, scales are E8M0 (``float8_e8m0fnu``, a byte b that means 2^(b-127)), and a block lies
along `axis`. Where its size is no multiple of 32, the last block is shorter.

With amax the largest magnitude of a block, ``scaling="floor"`` is the rule of the specification,
2^(floor(log2 amax) - 8): elements beyond 448 units saturate, which costs up to an eighth of amax.
``"rceil"`` takes the least power of two with amax <= 448 units, so that nothing saturates. Scales
come from the bits of amax, and the elements are rounded once, to nearest even: the quotient by a
power of two is exact where it matters.

Nothing is silent. NaN makes its block's scale NaN, and so the whole block. Infinity gets the
largest element at a scale of 2^120, whose product is infinite in float32; it leaves no bits for the
rest of its block. So has, under ``"rceil"``, what rounds to 2^128 in four bits: the largest three
percent of float32's numbers. Zeros keep their sign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops.unrounded import declare, kept, read

BLOCK = 32
LARGEST = 448.0  # of float8_e4m3fn, 1.75 * 2^8
SCALINGS = ("floor", "rceil")

_ELEMENT = torch.float8_e4m3fn
_SCALE = torch.float8_e8m0fnu
_NAN = 255
_MANTISSA = (1 << 23) - 1
_THREE_QUARTERS = 3 << 21  # the mantissa bits of 1.75

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("mx_quantise(Tensor x, int axis, str scaling) -> (Tensor values, Tensor scales)")
_library.define("mx_dequantise(Tensor values, Tensor scales, int axis) -> Tensor")


def _quantise(x: Tensor, axis: int, scaling: str) -> tuple[Tensor, Tensor]:
    _check(x, axis, scaling)
    blocks = _blocks(x, axis)
    scales = _scales(blocks, scaling)
    # 2^-E from its bits: b <= 247, so that it is a normal number. 0 times NaN is still NaN.
    inverse = torch.where(scales == _NAN, 0, (254 - scales) << 23).view(torch.float32)
    scaled = (blocks * inverse.unsqueeze(-1)).clamp_(-LARGEST, LARGEST)
    values = torch.empty_like(x, dtype=_ELEMENT).copy_(_joined(scaled, x.shape, axis))
    return values, _moved(scales.to(torch.uint8), axis).contiguous().view(_SCALE)


def _dequantise(values: Tensor, scales: Tensor, axis: int) -> Tensor:
    """Exact: an element has 4 bits, and 2^-136 is the least that there is."""
    _check(values, axis)
    blocks = _blocks(values.to(torch.float32), axis)
    factors = scales.to(torch.float32).movedim(axis, -1)
    return torch.empty_like(values, dtype=torch.float32).copy_(
        _joined(blocks * factors.unsqueeze(-1), values.shape, axis)
    )


def _scales(blocks: Tensor, scaling: str) -> Tensor:
    """The byte of each block's scale, as int32."""
    if blocks.shape[-2] == 0:
        return blocks.new_zeros(blocks.shape[:-1], dtype=torch.int32)
    amax = blocks.abs().amax(-1)  # NaN where there is one
    bits = amax.view(torch.int32)
    biased = (bits >> 23) - 8
    if scaling == "rceil":
        biased = biased + ((bits & _MANTISSA) > _THREE_QUARTERS)
    return torch.where(amax.isnan(), _NAN, biased.clamp(min=0))


def _blocks(x: Tensor, axis: int) -> Tensor:
    """``[..., blocks, 32]``, with zeros behind the end."""
    last = x.movedim(axis, -1)
    missing = -last.shape[-1] % BLOCK
    if missing:
        last = torch.nn.functional.pad(last, (0, missing))
    return last.reshape(*last.shape[:-1], last.shape[-1] // BLOCK, BLOCK)


def _joined(blocks: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The inverse of `_blocks`."""
    width = blocks.shape[-2] * BLOCK
    return _moved(blocks.reshape(*blocks.shape[:-2], width)[..., : shape[axis]], axis)


def _moved(last: Tensor, axis: int) -> Tensor:
    return last.movedim(-1, axis)


def _check(x: Tensor, axis: int, scaling: str = "floor") -> None:
    if x.dtype not in (torch.float32, _ELEMENT):
        raise ArgumentError(
            f"MXFP8 takes float32, not {x.dtype}", hint="convert it to float32 before"
        )
    if not -x.dim() <= axis < x.dim():
        raise ArgumentError(
            f"axis={axis} is not one of the {x.dim()} axes of the tensor",
            hint="pass the contracted axis",
        )
    if scaling not in SCALINGS:
        raise ArgumentError(
            f"scaling={scaling!r} is no rule for scales", hint=f"pass one of {', '.join(SCALINGS)}"
        )


def _fake_quantise(x: Tensor, axis: int, scaling: str) -> tuple[Tensor, Tensor]:
    _check(x, axis, scaling)
    shape = list(x.shape)
    shape[axis] = -(-shape[axis] // BLOCK)
    return torch.empty_like(x, dtype=_ELEMENT), x.new_empty(shape, dtype=_SCALE)


def _fake_dequantise(values: Tensor, scales: Tensor, axis: int) -> Tensor:
    _check(values, axis)
    return torch.empty_like(values, dtype=torch.float32)


for _name, _kernel, _fake in (
    ("mx_quantise", _quantise, _fake_quantise),
    ("mx_dequantise", _dequantise, _fake_dequantise),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
declare({"mx_quantise": kept, "mx_dequantise": read})
