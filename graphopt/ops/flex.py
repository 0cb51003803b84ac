"""Tensors of integers with one shared exponent, the format of Flexpoint (Köster et al., 2017).

    flex_quantise(Tensor x, Tensor exponent, int mantissa, int? seed_use=None, Tensor? seed=None)
        -> (Tensor mantissas, Tensor statistics)
    flex_dequantise(Tensor mantissas, Tensor exponent) -> Tensor
    flex_round(Tensor x, Tensor exponent, int mantissa, int? use=None, Tensor? seed=None)
        -> (Tensor rounded, Tensor statistics)

A value is ``m * 2^E`` with an int16 mantissa m, ``|m| <= M = 2^(mantissa - 1) - 1``, and one
exponent E, -126 to 126, for the whole tensor. An element becomes the mantissa closest to
``x / 2^E``, ties to even; what is beyond M saturates at M with its sign, infinities included, and
NaN becomes 0. Scaling by a power of two is exact, so nothing is rounded twice; where it underflows
the mantissa is 0 anyway.

`flex_round` is `flex_dequantise` of `flex_quantise`, without mantissas in memory. A value that
rounds to 2^128 is infinite in float32; all others are exact. A zero comes back as +0.

With `UNKNOWN` as exponent the operator chooses it: the least E with ``round(amax / 2^E) <= M``,
where amax is the largest finite magnitude. It is where the trial and error ends with which Autoflex
initialises an exponent.

`statistics` is int32 [4]: the bits of amax as float32, how many elements saturated, how many are
NaN, and the exponent used. Where nothing finite but zeros was seen and the exponent was `UNKNOWN`,
0 is used and `UNKNOWN` is reported, which `flex_dequantise` takes for 0. Counts are for fewer than
2^31 elements.

With a seed, int64 [2] of seed and step, an element is rounded up with the probability of its
fraction, so that its mean is right to 2^-24 of a unit: ``floor(y) + [u < y - floor(y)]`` with u of
24 bits from `graphopt.ops.philox` at the element's index in contiguous order. `use` tells the
tensors of a step apart.

Results have the geometry of `x`. There is no autograd and no host synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops.philox import words
from graphopt.ops.unrounded import declare, read

UNKNOWN = -(2**31)
# 2^-E and 2^E are normal float32 numbers between these.
LEAST_EXPONENT = -126
MOST_EXPONENT = 126
MANTISSAS = range(8, 17)

_BIAS = 127
_FRACTION_BITS = 23
_MAGNITUDE = 2**31 - 1
_INFINITY = 255 << _FRACTION_BITS

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "flex_quantise(Tensor x, Tensor exponent, int mantissa, int? seed_use=None, Tensor? seed=None)"
    " -> (Tensor mantissas, Tensor statistics)"
)
_library.define("flex_dequantise(Tensor mantissas, Tensor exponent) -> Tensor")
_library.define(
    "flex_round(Tensor x, Tensor exponent, int mantissa, int? use=None, Tensor? seed=None)"
    " -> (Tensor rounded, Tensor statistics)"
)


def largest_mantissa(mantissa: int) -> int:
    """M, the largest magnitude of a mantissa of that many bits, sign included."""
    return (1 << (mantissa - 1)) - 1


def power_of_two(exponent: Tensor) -> Tensor:
    """``2 ** exponent`` from its bits; library functions may be off by one in the last place.

    Args:
        exponent: int32, any value; it is clamped to -126 to 126.

    Returns:
        float32 of the same shape.
    """
    clamped = exponent.clamp(LEAST_EXPONENT, MOST_EXPONENT)
    bits = (clamped + _BIAS) << _FRACTION_BITS
    return bits.view(torch.float32)


def chosen_exponent(amax_bits: Tensor, mantissa: int) -> Tensor:
    """The least E, -126 to 126, with ``round(amax / 2^E) <= M``; int32 like `amax_bits`."""
    # Beyond M + 1/2, which ties to M + 1, amax needs one more power of two.
    limit = 2**_FRACTION_BITS - (1 << (_FRACTION_BITS + 1 - mantissa))
    fraction = amax_bits & (2**_FRACTION_BITS - 1)
    chosen: Tensor = (
        (amax_bits >> _FRACTION_BITS) - _BIAS - mantissa + 2 + (fraction >= limit).int()
    )
    return chosen.clamp(LEAST_EXPONENT, MOST_EXPONENT)


def used_exponent(amax_bits: Tensor, exponent: Tensor, mantissa: int) -> tuple[Tensor, Tensor]:
    """The exponent to quantise with and the one to report, for one that may be `UNKNOWN`."""
    has_none = amax_bits == 0
    is_unknown = exponent == UNKNOWN
    chosen = chosen_exponent(amax_bits, mantissa)
    known = exponent.clamp(LEAST_EXPONENT, MOST_EXPONENT)
    used = torch.where(is_unknown, torch.where(has_none, 0, chosen), known)
    return used, torch.where(is_unknown & has_none, UNKNOWN, used)


def check(x: Tensor, exponent: Tensor, mantissa: int, use: int | None, seed: Tensor | None) -> None:
    """Raise `ArgumentError` unless the arguments are as the operators take them."""
    if x.dtype is not torch.float32 or x.layout is not torch.strided:
        raise ArgumentError(
            f"flex tensors are made of dense float32, not {x.dtype} {x.layout}",
            hint="convert the tensor, or leave it in its own dtype",
        )
    if mantissa not in MANTISSAS:
        raise ArgumentError(
            f"mantissa={mantissa} bits do not fit int16 with a sign and some precision",
            hint=f"pass {MANTISSAS.start} to {MANTISSAS.stop - 1}",
        )
    _check_exponent(x, exponent)
    if (use is None) != (seed is None):
        raise ArgumentError(
            "stochastic rounding takes a seed and what it is used for, not one of both",
            hint="pass both, or neither to round to nearest",
        )
    if seed is not None and (
        seed.dtype is not torch.int64 or seed.shape != (2,) or seed.device != x.device
    ):
        raise ArgumentError(
            f"the seed for a tensor on {x.device} is int64 of shape (2,) there, "
            f"not {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}",
            hint="pass torch.tensor([seed, step], device=x.device)",
        )
    if use is not None and not 0 <= use < 2**31:
        raise ArgumentError(f"use={use} is out of range", hint="pass 0 to 2**31 - 1")


def _check_exponent(x: Tensor, exponent: Tensor) -> None:
    if exponent.dtype is not torch.int32 or exponent.dim() or exponent.device != x.device:
        raise ArgumentError(
            f"the exponent of a flex tensor on {x.device} is one int32 there, "
            f"not {exponent.dtype} of shape {tuple(exponent.shape)} on {exponent.device}",
            hint="pass torch.tensor(exponent, dtype=torch.int32, device=x.device)",
        )


def check_mantissas(mantissas: Tensor, exponent: Tensor) -> None:
    """Raise `ArgumentError` unless they are int16 with one int32 exponent."""
    if mantissas.dtype is not torch.int16:
        raise ArgumentError(
            f"mantissas of flex tensors are int16, not {mantissas.dtype}",
            hint="pass the first result of graphopt::flex_quantise",
        )
    _check_exponent(mantissas, exponent)


def _amax_bits(bits: Tensor) -> Tensor:
    # As integers, magnitudes are in the order of the numbers, and a maximum has no order.
    finite = torch.where(bits < _INFINITY, bits, 0)
    return finite.amax() if bits.numel() else finite.sum(dtype=torch.int32)


def _rounded(
    x: Tensor, exponent: Tensor, mantissa: int, use: int | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mantissas as float32, the exponent used, and the statistics."""
    check(x, exponent, mantissa, use, seed)
    x = x.detach()
    bits = x.view(torch.int32) & _MAGNITUDE
    amax = _amax_bits(bits)
    used, reported = used_exponent(amax, exponent, mantissa)
    y = x * power_of_two(-used)
    if seed is None or use is None:
        y = y.round()
    else:
        low = y.floor()
        uniform = (words(x.numel(), seed, use) >> 8).to(torch.float32) * 2.0**-24
        y = low + (uniform.view(x.shape) < y - low).to(torch.float32)
    limit = float(largest_mantissa(mantissa))
    saturated = (y.abs() > limit).sum(dtype=torch.int32)
    is_nan = bits > _INFINITY
    mantissas = torch.where(is_nan, 0.0, y.clamp(-limit, limit))
    statistics = torch.stack([amax, saturated, is_nan.sum(dtype=torch.int32), reported])
    return mantissas, used, statistics


def flex_quantise(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    seed_use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference of `graphopt::flex_quantise`, on every device."""
    rounded, _, statistics = _rounded(x, exponent, mantissa, seed_use, seed)
    return torch.empty_like(x, dtype=torch.int16).copy_(rounded), statistics


def flex_dequantise(mantissas: Tensor, exponent: Tensor) -> Tensor:
    """The reference of `graphopt::flex_dequantise`, on every device."""
    check_mantissas(mantissas, exponent)
    values = torch.empty_like(mantissas, dtype=torch.float32)
    unit = power_of_two(torch.where(exponent == UNKNOWN, 0, exponent))
    return torch.mul(mantissas.to(torch.float32), unit, out=values)


def flex_round(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference of `graphopt::flex_round`, on every device."""
    rounded, used, statistics = _rounded(x, exponent, mantissa, use, seed)
    # Mantissas are integers and have no -0: adding +0 turns it into +0.
    values = torch.empty_like(x)
    return torch.mul(rounded + 0.0, power_of_two(used), out=values), statistics


def _fake_quantise(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    seed_use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(x, exponent, mantissa, seed_use, seed)
    return torch.empty_like(x, dtype=torch.int16), x.new_empty(4, dtype=torch.int32)


def _fake_dequantise(mantissas: Tensor, exponent: Tensor) -> Tensor:
    check_mantissas(mantissas, exponent)
    return torch.empty_like(mantissas, dtype=torch.float32)


def _fake_round(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(x, exponent, mantissa, use, seed)
    return torch.empty_like(x), x.new_empty(4, dtype=torch.int32)


def _kept(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """A quantiser that keeps the values; its statistics say nothing."""
    return x, torch.zeros(4, dtype=torch.int32, device=x.device)


for _name, _kernel, _fake in (
    ("flex_quantise", flex_quantise, _fake_quantise),
    ("flex_dequantise", flex_dequantise, _fake_dequantise),
    ("flex_round", flex_round, _fake_round),
):
    # One kernel for every device; `graphopt.runtime.kernels` brings faster ones for some.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
declare({"flex_quantise": _kept, "flex_round": _kept, "flex_dequantise": read})
