"""Autoflex for one tensor in plain Python numbers, written from the publication's pseudocode."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction


def largest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def gamma_of(amax: float, exponent: int, bits: int) -> int:
    """Γ of a tensor whose largest magnitude is `amax`: rounded to even, saturated."""
    return min(round(Fraction(amax) / Fraction(2) ** exponent), largest(bits))


def algorithm_1(amax: float, bits: int, start: int = 0, steps: int = 200) -> int:
    """The exponent at which trial and error ends; a tensor of zeros never ends."""
    exponent = start
    for _ in range(steps):
        gamma = gamma_of(amax, exponent, bits)
        if gamma >= largest(bits):
            exponent += (bits - 1) // 2
        elif gamma < 2 ** (bits - 2):
            exponent += math.ceil(math.log2(max(gamma, 1))) - (bits - 2)
            if gamma > 2 ** ((bits - 1) // 2 - 2):
                return exponent
        else:
            return exponent
    raise AssertionError(f"not finished after {steps} trials")


@dataclass
class Scalar:
    """What one tensor keeps."""

    rule: str
    bits: int
    least: int
    most: int
    exponent: int | None = None
    seen: int = 0
    renewals: int = 0
    queue: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.queue = deque(maxlen={"paper": 16, "code2016": 16, "delayed": 1024}[self.rule])

    def renew(self, amax: float) -> int | None:
        self.renewals += 1
        if amax == 0:
            return self.exponent
        self.seen += 1
        if self.exponent is None:
            self.exponent = self._clamp(self._fits(amax))
        unit, used = 2.0**self.exponent, self.exponent
        gamma = gamma_of(amax, used, self.bits)
        if self.rule == "delayed":
            self.queue.append(amax)
            self.exponent = self._clamp(self._fits(max(self.queue)))
            return self.exponent
        if gamma >= largest(self.bits):
            self.queue.clear()
            gamma *= 2
        self.queue.append(gamma * unit)
        chi = max(self.queue) + 3 * statistics.pstdev(self.queue) + 100 * unit
        if self.rule == "paper":
            found = math.ceil(math.log2(2 * chi)) - self.bits + 1
        else:
            if self.seen / self.renewals < 1 / 16:
                chi = max([*self.queue][-2:]) + 2**12 * unit
            found = math.floor(math.log2(chi)) - (self.bits - 2)
        self.exponent = self._clamp(found)
        return self.exponent

    def _fits(self, amax: float) -> int:
        """The least exponent at which nothing saturates."""
        exponent = math.frexp(amax)[1] - self.bits
        while round(Fraction(amax) / Fraction(2) ** exponent) > largest(self.bits):
            exponent += 1
        return max(-126, min(126, exponent))

    def _clamp(self, exponent: int) -> int:
        return max(self.least, min(self.most, exponent))
