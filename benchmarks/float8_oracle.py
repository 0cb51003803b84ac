"""Rounding to float8 by integers, without any cast of torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Bits of the fraction, bias of the exponent, byte of the largest finite number.
FORMATS = {"e4m3": (3, 7, 0x7E), "e5m2": (2, 15, 0x7B)}


def rounded_bytes(values: Tensor, format: str) -> Tensor:
    """Bytes of float8 numbers nearest to float64 numbers, ties to even, saturating.

    Args:
        values: float64, finite.
        format: ``"e4m3"`` or ``"e5m2"``.
    """
    fraction, bias, largest = FORMATS[format]
    bits = values.numpy().view(np.uint64)
    sign = (bits >> np.uint64(63)).astype(np.int64)
    exponent = ((bits >> np.uint64(52)) & np.uint64(0x7FF)).astype(np.int64)
    mantissa = (bits & np.uint64(2**52 - 1)).astype(np.int64)
    mantissa = np.where(exponent > 0, mantissa + 2**52, mantissa)
    exponent = np.maximum(exponent, 1) - 1023 - 52  # value = mantissa * 2^exponent
    # The unit of the result: that of the number's binade, or of the subnormal ones.
    top = exponent + 52
    unit = np.maximum(top, 1 - bias) - fraction
    shift = np.minimum(unit - exponent, 62)  # at least 49: float64 is much finer
    whole, rest = mantissa >> shift, mantissa & ((np.int64(1) << shift) - 1)
    half = np.int64(1) << (shift - 1)
    whole = whole + ((rest > half) | ((rest == half) & (whole % 2 == 1)))
    # Units from the lowest binade up to this one are what a byte counts, carries included.
    code = whole + (np.maximum(top, 1 - bias) - (1 - bias)) * 2**fraction
    code = np.minimum(code, largest) | (sign << 7)
    return torch.from_numpy(code.astype(np.uint8))
