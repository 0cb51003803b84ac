"""Float8 by its definition: every number that there is, and the nearest of them.

Shares nothing with torch's casts or ours: a byte's value is put together from sign, exponent and
fraction, and a number goes to the nearest value, of two to that with the even byte.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Bits of the fraction, bias of the exponent, byte of the largest finite number.
_FORMATS = {torch.float8_e4m3fn: (3, 7, 0x7E), torch.float8_e5m2: (2, 15, 0x7B)}


def magnitudes(dtype: torch.dtype) -> list[Fraction]:
    """The finite magnitudes, in order; the index is the byte."""
    bits, bias, largest = _FORMATS[dtype]
    found = []
    for byte in range(largest + 1):
        exponent, fraction = divmod(byte, 2**bits)
        whole = fraction + (2**bits if exponent else 0)
        found.append(whole * Fraction(2) ** (max(exponent, 1) - bias - bits))
    return found


def nearest_bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of the nearest numbers, ties to even, saturating; the sign of zeros is kept.

    Args:
        values: finite float64. Halves between neighbours are exact in float64, so comparing with
            them is.
    """
    grid = magnitudes(dtype)
    halves = np.array([float((a + b) / 2) for a, b in pairwise(grid)])
    size = np.abs(values.numpy())
    below, above = np.searchsorted(halves, size, "left"), np.searchsorted(halves, size, "right")
    byte = np.where(below % 2 == 0, below, above)  # a tie lies between the two
    return torch.from_numpy((byte | np.where(np.signbit(values.numpy()), 128, 0)).astype(np.uint8))


def rows_at_every_exponent(width: int, per_exponent: int = 4, seed: int = 0) -> Tensor:
    """float32 [rows, width], the magnitude of each row in another binade: subnormal to largest.

    Normal numbers, ties of every element with four bits, wide ranges with zeros of either sign, and
    the next number above 448 units.
    """
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(torch.float32).max
    rows = []
    for exponent in range(-149, 128):
        for kind in range(per_exponent):
            row = torch.randn(width, generator=generator, dtype=torch.float64)
            if kind == 1:
                odd = torch.randint(16, 32, (width,), generator=generator) * 2 + 1
                down = torch.randint(0, 16, (width,), generator=generator)
                row = odd.double() / 64 / 2.0**down * row.sign()
            elif kind == 2:
                row = row * 2.0 ** torch.randint(-24, 1, (width,), generator=generator)
                row[::7], row[::11] = 0.0, -0.0
            elif kind == 3:
                row = row.clamp(-1.7, 1.7)
                row[::32] = 1.75 + 2.0**-23
            rows.append((row * 2.0**exponent).clamp(-largest, largest).float())
    return torch.stack(rows)
