"""How many results are not the closest multiple of 2^E, against integers, for all exponents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quantise_peers import EXACT_PEERS

# Those at which all multiples of up to 32767 are normal float32 numbers.
EXPONENTS = range(-126, 113)
COUNT = 2000
LIMIT = 32767


def numbers(e: int) -> dict[str, NDArray[np.float32]]:
    """Numbers that do not saturate: normally distributed, uniform, and halfway between two."""
    generator = np.random.default_rng(e + 1000)
    normal = generator.normal(0, LIMIT / 5, COUNT).clip(-LIMIT, LIMIT)
    uniform = generator.uniform(-LIMIT, LIMIT, COUNT)
    ties = generator.integers(-LIMIT, LIMIT, COUNT) + 0.5
    kinds = {"normal": normal, "uniform": uniform, "ties": ties}
    return {name: (values * 2.0**e).astype(np.float32) for name, values in kinds.items()}


def closest(x: NDArray[np.float32], e: int) -> NDArray[np.int64]:
    """The closest integers to ``x / 2^e``, ties to even, by integers from the bits of x."""
    bits = x.view(np.uint32).astype(np.int64)
    field, fraction = bits >> 23 & 255, bits & (2**23 - 1)
    significand = np.where(field > 0, fraction + 2**23, fraction)
    # x is significand * 2^(field - 150); here it is below 2^15 units, so the shift is to the right.
    shift = np.clip(e + 150 - np.maximum(field, 1), 0, 62)
    whole, rest = significand >> shift, significand & ((1 << shift) - 1)
    half = np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0)
    up = (rest > half) | ((rest == half) & (shift > 0) & (whole % 2 == 1))
    return np.where(bits >> 31 > 0, -1, 1) * (whole + up)


def misrounds(device: str) -> dict[str, Any]:
    """Of each peer: misrounded results per kind of numbers, or why they could not be counted."""
    found: dict[str, Any] = {"numbers of each kind": COUNT * len(EXPONENTS)}
    for name, quantise in EXACT_PEERS.items():
        counts = {"normal": 0, "uniform": 0, "ties": 0, "exponents with any": 0}
        try:
            for e in EXPONENTS:
                total = 0
                for kind, values in numbers(e).items():
                    result = quantise(torch.from_numpy(values).to(device), e).cpu().double()
                    wanted = torch.from_numpy(closest(values, e)).double() * 2.0**e
                    wrong = int((result != wanted).sum())
                    counts[kind] += wrong
                    total += wrong
                counts["exponents with any"] += total > 0
        except Exception as error:  # Whatever a peer that is not installed, or fails, raises.
            reason = next(iter(str(error).splitlines()), "")
            found[name] = f"{type(error).__name__}: {reason}"
        else:
            found[name] = counts
    return found
