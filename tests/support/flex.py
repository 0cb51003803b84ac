"""Oracles of flex tensors in Python's integers and fractions, from the bits of float32."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.uint32]
WORD = 2**32 - 1


def exponent(value: int, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=device)


def hard_bits(e: int, mantissa: int, count: int) -> Bits:
    """Bits of finite numbers: any, those of the size of units, ties, and what is near the limit."""
    generator = np.random.default_rng(e + 1000 * mantissa)
    anything = generator.integers(0, 2**32, count, dtype=np.uint32)
    limit = 2 ** (mantissa - 1) - 1
    sized = generator.integers(-2 * limit, 2 * limit, count) + generator.random(count)
    ties = np.concatenate([
        generator.integers(-limit - 2, limit + 2, count) + 0.5,
        np.arange(-9, 10) / 2,
        *(np.arange(-2, 3) / 2 + edge for edge in (-limit, limit)),
    ])  # fmt: skip
    with np.errstate(over="ignore", under="ignore"):
        near = (np.concatenate([sized, ties]) * 2.0**e).astype(np.float32)
        sides = [np.nextafter(near, np.float32(0)), np.nextafter(near, near * 2)]
    near = np.concatenate([near, *sides])
    special = np.array([0, 0x80000000, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF], dtype=np.uint32)
    bits = np.concatenate([anything, near.view(np.uint32), special])
    return bits[np.isfinite(bits.view(np.float32))]


def scaled(bits: int, e: int) -> tuple[int, int]:
    """The number ``x / 2^e`` of float32 bits, not infinite and not NaN, as numerator and 2^d."""
    field, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    significand = fraction | (1 << 23 if field else 0)
    power = max(field, 1) - 150 - e
    significand = -significand if bits >> 31 else significand
    return (significand << power, 1) if power >= 0 else (significand, 1 << -power)


def exact_mantissas(
    bits: Bits, e: int, mantissa: int, random: tuple[int, int, int] | None = None
) -> tuple[NDArray[np.int16], int]:
    """The mantissas of finite numbers, and how many are saturated.

    Args:
        bits: of float32 numbers.
        e: the exponent.
        mantissa: number of bits.
        random: seed, step and use of stochastic rounding; None rounds to nearest.
    """
    limit = 2 ** (mantissa - 1) - 1
    found, saturated = [], 0
    for index, pattern in enumerate(bits.tolist()):
        numerator, denominator = scaled(pattern, e)
        m, rest = divmod(numerator, denominator)
        if random is None:
            m += 2 * rest + m % 2 > denominator
        else:
            seed, step, use = random
            counter = (index // 4, 0, step & WORD, use)
            word = exact_philox(counter, (seed & WORD, seed >> 32 & WORD))[index % 4]
            # The fraction is a float32 by contract.
            m += (word >> 8) / 2**24 < float(np.float32(rest / denominator))
        saturated += abs(m) > limit
        found.append(max(-limit, min(limit, m)))
    return np.array(found, dtype=np.int16), saturated


def exact_exponent(amax: Fraction, mantissa: int) -> int:
    """The least exponent, -126 to 126, at which `amax` does not round beyond the limit."""
    limit = 2 ** (mantissa - 1) - 1
    return next(e for e in range(-126, 127) if round(amax / Fraction(2) ** e) <= limit)


def exact_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32 with 10 rounds, as in the paper's figure."""
    right0, left1, right2, left3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * right0, 0xCD9E8D57 * right2
        right0, left1, right2, left3 = (
            p1 >> 32 ^ left1 ^ k0, p1 & WORD, p0 >> 32 ^ left3 ^ k1, p0 & WORD,
        )  # fmt: skip
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return right0, left1, right2, left3
