"""The flex operators by Triton: one pass over memory, or two where the exponent is unknown.

Statistics are maxima and sums of integers by atomics, so the order of programs changes no bit. The
exponent is read from the device's memory; a kernel in front finds amax, and ends at once where the
exponent is known. Nothing synchronises with the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.ops import flex
from graphopt.runtime.kernels.place import Place

BLOCK = 4096

_UNKNOWN = tl.constexpr(flex.UNKNOWN)
_LEAST = tl.constexpr(flex.LEAST_EXPONENT)
_MOST = tl.constexpr(flex.MOST_EXPONENT)
_MAGNITUDE = tl.constexpr(2**31 - 1)
_INFINITY = tl.constexpr(255 << 23)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _clamped(exponent):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(exponent, _LEAST), _MOST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def amax_kernel(x, exponent, statistics, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of the largest finite magnitude to `statistics[0]`, if the exponent is unknown."""
    if tl.load(exponent) == _UNKNOWN:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(x + at, mask=at < count, other=0.0).to(tl.int32, bitcast=True) & _MAGNITUDE
        tl.atomic_max(statistics, tl.max(tl.where(bits < _INFINITY, bits, 0)))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _uniform(seed, use, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of 24 bits for the elements of this program; see `graphopt.ops.philox`."""
    group = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    step = tl.full(low.shape, 0, tl.uint32) + tl.load(seed + 1).to(tl.uint32)
    of_use = tl.full(low.shape, 0, tl.uint32) + use.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), low, high, step, of_use)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["use"])  # type: ignore[untyped-decorator, unused-ignore]
def rounding_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    exponent,
    statistics,
    seed,
    count,
    use,
    MANTISSA: tl.constexpr,
    TO_VALUES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mantissas, or values, and statistics of one block."""
    LIMIT: tl.constexpr = (1 << (MANTISSA - 1)) - 1
    e = tl.load(exponent)
    used = _clamped(e)
    reported = used
    if e == _UNKNOWN:
        amax = tl.load(statistics)
        above = ((amax & 0x7FFFFF) >= (1 << 23) - (1 << (24 - MANTISSA))).to(tl.int32)
        chosen = _clamped((amax >> 23) - 125 - MANTISSA + above)
        used = tl.where(amax == 0, 0, chosen)
        reported = tl.where(amax == 0, _UNKNOWN, chosen)

    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = at < count
    number = tl.load(x + at, mask=present, other=0.0)
    bits = number.to(tl.int32, bitcast=True) & _MAGNITUDE
    is_nan = bits > _INFINITY
    # One beyond the limit still shows that it saturates, and is small enough for conversions,
    # whose results differ from device to device out of range.
    y = tl.where(is_nan, 0.0, number * _power_of_two(-used))
    y = tl.minimum(tl.maximum(y, -(LIMIT + 1.0)), LIMIT + 1.0)
    low = tl.floor(y)
    fraction = y - low
    if STOCHASTIC:
        up = _uniform(seed, use, BLOCK) < fraction
    else:
        is_odd = (low.to(tl.int32) & 1) != 0
        up = (fraction > 0.5) | ((fraction == 0.5) & is_odd)
    rounded = low.to(tl.int32) + up.to(tl.int32)
    saturated = (rounded > LIMIT) | (rounded < -LIMIT)
    rounded = tl.minimum(tl.maximum(rounded, -LIMIT), LIMIT)
    if TO_VALUES:
        tl.store(out + at, rounded.to(tl.float32) * _power_of_two(used), mask=present)
    else:
        tl.store(out + at, rounded.to(tl.int16), mask=present)

    tl.atomic_max(statistics, tl.max(tl.where(bits < _INFINITY, bits, 0)))
    saturations = tl.sum(saturated.to(tl.int32))
    if saturations > 0:
        tl.atomic_add(statistics + 1, saturations)
    nans = tl.sum(is_nan.to(tl.int32))
    if nans > 0:
        tl.atomic_add(statistics + 2, nans)
    if tl.program_id(0) == 0:
        tl.store(statistics + 3, reported)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def dequantise_kernel(mantissas, out, exponent, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of one block."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = at < count
    e = tl.load(exponent)
    unit = _power_of_two(_clamped(tl.where(e == _UNKNOWN, 0, e)))
    values = tl.load(mantissas + at, mask=present, other=0).to(tl.float32) * unit
    tl.store(out + at, values, mask=present)


def flex_quantise(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    seed_use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`graphopt.ops.flex.flex_quantise` by Triton."""
    return _round(torch.int16, x, exponent, mantissa, seed_use, seed)


def flex_round(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`graphopt.ops.flex.flex_round` by Triton."""
    return _round(torch.float32, x, exponent, mantissa, use, seed)


def _round(
    dtype: torch.dtype,
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    use: int | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    flex.check(x, exponent, mantissa, use, seed)
    place = Place.of(x, dtype, in_order=seed is not None)
    statistics = torch.zeros(4, dtype=torch.int32, device=x.device)
    # An empty tensor has one program, too, which reports the exponent.
    grid = (max(1, triton.cdiv(x.numel(), BLOCK)),)
    amax_kernel[grid](place.source, exponent, statistics, x.numel(), BLOCK=BLOCK, num_warps=8)
    rounding_kernel[grid](
        place.source, place.result, exponent, statistics,
        exponent if seed is None else seed.contiguous(), x.numel(), use or 0,
        MANTISSA=mantissa, TO_VALUES=dtype is torch.float32, STOCHASTIC=seed is not None,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return place.finish(), statistics


def flex_dequantise(mantissas: Tensor, exponent: Tensor) -> Tensor:
    """`graphopt.ops.flex.flex_dequantise` by Triton."""
    flex.check_mantissas(mantissas, exponent)
    place = Place.of(mantissas, torch.float32)
    count = mantissas.numel()
    if count:
        grid = (triton.cdiv(count, BLOCK),)
        dequantise_kernel[grid](
            place.source, place.result, exponent, count, BLOCK=BLOCK, num_warps=8
        )
    return place.finish()
