"""Gradients as integers, so that their sum does not depend on the order of the summands.

    magnitudes(Tensor[] gradients) -> Tensor
    to_wire(Tensor[] gradients, Tensor magnitudes, int contributions) -> Tensor
    from_wire(Tensor flat, Tensor magnitudes, Tensor[] like, int contributions, int divisor)
        -> Tensor[]

A floating-point sum depends on its order, and so on the algorithm of a collective, the number of
ranks and the layout of groups; an integer sum does not. Between the operators the caller reduces
twice: `magnitudes` by maximum, then the result of `to_wire` by sum.

Each tensor has one unit, 2^E, where E is the least exponent with
``magnitude <= floor((2^31 - 1) / contributions) * 2^E``, and an element travels as the integer
closest to ``element / 2^E``, ties to even. So `contributions` of them cannot overflow, and each is
wrong by at most half a unit. E is at least `LEAST_EXPONENT`; elements below half of that unit
become 0. The sign of a zero is lost. A mean that rounds to beyond its dtype comes back infinite.

Bits are the same for any number of ranks when every contribution is quantised by itself and both
the magnitudes and `contributions` (an upper bound is enough) are the same on all sides.

A tensor whose magnitude is not finite travels as zeros and comes back as NaN. Operators run without
autograd; call them where gradients are not recorded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError

# 2^-E is the factor of `to_wire`, and 2^126 is the largest one whose inverse is a normal float32.
LEAST_EXPONENT = -126
# Leaves 7 bits for each contribution, and keeps E of the largest float32 at 122 or less.
MOST_CONTRIBUTIONS = 2**24

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("magnitudes(Tensor[] gradients) -> Tensor")
_library.define("to_wire(Tensor[] gradients, Tensor magnitudes, int contributions) -> Tensor")
_library.define(
    "from_wire(Tensor flat, Tensor magnitudes, Tensor[] like, int contributions, int divisor) "
    "-> Tensor[]"
)


def exponents(magnitudes: Tensor, contributions: int) -> Tensor:
    """The exponent E of each tensor's unit, as int32.

    Args:
        magnitudes: float32, the largest absolute value of each tensor over all contributions.
        contributions: how many integers are summed at most, 1 to `MOST_CONTRIBUTIONS`.

    Returns:
        One exponent per magnitude; meaningless where the magnitude is not finite.

    Raises:
        ArgumentError: `contributions` is out of range.
    """
    limit_mantissa, limit_exponent = math.frexp(_limit(contributions))
    finite = torch.where(magnitudes.isfinite(), magnitudes, 0.0)
    # In float64 subnormal float32 numbers are normal, and the limit is exact.
    mantissa, exponent = torch.frexp(finite.double())
    units = exponent - limit_exponent + (mantissa > limit_mantissa)
    return units.clamp(min=LEAST_EXPONENT).to(torch.int32)


def _limit(contributions: int) -> int:
    """The largest integer that one contribution may send."""
    if not 1 <= contributions <= MOST_CONTRIBUTIONS:
        raise ArgumentError(
            f"contributions={contributions} does not fit the int32 wire",
            hint=f"pass 1 to {MOST_CONTRIBUTIONS}, or send gradients in their own dtype",
        )
    return (2**31 - 1) // contributions


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2 ** exponent`` from its bits; library functions may be off by one in the last place."""
    if dtype is torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _working_dtype(gradient: Tensor) -> torch.dtype:
    return torch.float64 if gradient.dtype is torch.float64 else torch.float32


def _check(tensors: Sequence[Tensor], magnitudes: Tensor | None = None) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            raise ArgumentError(
                f"the int32 wire takes dense real gradients, not {tensor.dtype} {tensor.layout}",
                hint="send this gradient in its own dtype",
            )
    if magnitudes is None:
        return
    if magnitudes.dtype is not torch.float32 or magnitudes.shape != (len(tensors),):
        raise ArgumentError(
            f"{len(tensors)} tensors need as many float32 magnitudes, "
            f"not {magnitudes.dtype} of shape {tuple(magnitudes.shape)}",
            hint="pass the result of graphopt::magnitudes, reduced by maximum over all ranks",
        )


def _magnitude(gradient: Tensor) -> Tensor:
    if gradient.numel() == 0:
        return gradient.new_zeros((), dtype=torch.float32)
    low, high = torch.aminmax(gradient.detach())
    exact = torch.maximum(-low, high)
    rounded = exact.to(torch.float32)
    if exact.dtype is torch.float64:
        # Upwards: a bound that is too low would let the largest element overflow.
        above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
        rounded = torch.where(rounded.double() < exact, above, rounded)
    # Reductions by maximum may drop NaN, but not infinity.
    return rounded.nan_to_num(nan=math.inf, posinf=math.inf)


def _magnitudes(gradients: Sequence[Tensor]) -> Tensor:
    _check(gradients)
    if not gradients:
        return torch.zeros(0)
    return torch.stack([_magnitude(gradient) for gradient in gradients])


def _to_wire(gradients: Sequence[Tensor], magnitudes: Tensor, contributions: int) -> Tensor:
    _check(gradients, magnitudes)
    limit = _limit(contributions)
    # 2^31 - 1 is not a float32; the next one above it would overflow in the conversion.
    spare_bits = max(0, limit.bit_length() - 24)
    bounds = {torch.float32: limit >> spare_bits << spare_bits, torch.float64: limit}
    units = exponents(magnitudes, contributions)
    is_finite = magnitudes.isfinite()
    factors = {
        dtype: torch.where(is_finite, _power_of_two(-units, dtype), 0.0).unbind()
        for dtype in bounds
    }
    flat = magnitudes.new_empty(sum(g.numel() for g in gradients), dtype=torch.int32)
    places = flat.split_with_sizes([g.numel() for g in gradients]) if gradients else ()
    for index, (gradient, place) in enumerate(zip(gradients, places, strict=True)):
        dtype = _working_dtype(gradient)
        # Exact, except where it underflows, and there the integer is 0 anyway.
        scaled = gradient.detach().to(dtype) * factors[dtype][index]
        # 0 times infinity is NaN. Only what the magnitude did not show is out of bounds.
        scaled = scaled.round_().clamp_(-bounds[dtype], bounds[dtype]).nan_to_num_(nan=0.0)
        place.view(gradient.shape).copy_(scaled)
    return flat


def _from_wire(
    flat: Tensor, magnitudes: Tensor, like: Sequence[Tensor], contributions: int, divisor: int
) -> list[Tensor]:
    _check(like, magnitudes)
    sizes = [tensor.numel() for tensor in like]
    if flat.dtype is not torch.int32 or flat.shape != (sum(sizes),):
        raise ArgumentError(
            f"{sum(sizes)} elements are expected as flat int32, "
            f"not {flat.dtype} of shape {tuple(flat.shape)}",
            hint="pass the reduced result of graphopt::to_wire and the tensors it was made for",
        )
    if divisor < 1:
        raise ArgumentError(
            f"divisor={divisor} is not positive", hint="pass the number of contributions, or 1"
        )
    units = _power_of_two(exponents(magnitudes, contributions), torch.float64)
    factors = torch.where(magnitudes.isfinite(), units, math.nan).unbind()
    results = [torch.empty_like(tensor) for tensor in like]
    parts = flat.split_with_sizes(sizes) if like else ()
    for result, part, factor in zip(results, parts, factors, strict=True):
        # An int32 times a power of two is exact in float64; the division rounds once.
        value = part.to(torch.float64).mul_(factor)
        if divisor > 1:
            value.div_(divisor)
        # Halves go through float32 too, as in PyTorch, so that every backend agrees.
        result.detach().copy_(value.to(_working_dtype(result)).view(result.shape))
    return results


def _fake_magnitudes(gradients: Sequence[Tensor]) -> Tensor:
    size = (len(gradients),)
    return gradients[0].new_empty(size, dtype=torch.float32) if gradients else torch.empty(size)


def _fake_to_wire(gradients: Sequence[Tensor], magnitudes: Tensor, contributions: int) -> Tensor:
    _limit(contributions)
    return magnitudes.new_empty(sum(g.numel() for g in gradients), dtype=torch.int32)


def _fake_from_wire(
    flat: Tensor, magnitudes: Tensor, like: Sequence[Tensor], contributions: int, divisor: int
) -> list[Tensor]:
    _limit(contributions)
    return [torch.empty_like(tensor) for tensor in like]


for _name, _kernel, _fake in (
    ("magnitudes", _magnitudes, _fake_magnitudes),
    ("to_wire", _to_wire, _fake_to_wire),
    ("from_wire", _from_wire, _fake_from_wire),
):
    # One kernel for every device, and for an empty list, which names none.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
