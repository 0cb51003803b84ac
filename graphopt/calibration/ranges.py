"""Count the magnitudes of tensors by binade."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.calibration.record import FORMATS, Range

_LEAST = -150  # below the exponent of the smallest subnormal number of float32


@dataclass
class RangeCounter:
    """Counts what is shown to it; see `Range`."""

    elements: int = 0
    zeros: int = 0
    nan: int = 0
    infinite: int = 0
    amax: float = 0.0
    binades: dict[int, int] = field(default_factory=dict)
    inexact: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORMATS, 0))

    def add(self, value: Tensor) -> None:
        """Count a float32 tensor of any shape."""
        flat = value.detach().flatten().abs()
        finite = flat[flat.isfinite()]
        nonzero = finite[finite != 0]
        self.elements += flat.numel()
        nan = int(flat.isnan().sum())
        self.nan += nan
        self.infinite += flat.numel() - finite.numel() - nan
        self.zeros += finite.numel() - nonzero.numel()
        if not nonzero.numel():
            return
        self.amax = max(self.amax, float(nonzero.max()))
        significand, exponent = torch.frexp(nonzero)
        counts = torch.bincount(exponent.long() - 1 - _LEAST)
        for place in counts.nonzero().flatten().tolist():
            at = place + _LEAST
            self.binades[at] = self.binades.get(at, 0) + int(counts[place])
        for name, dtype in FORMATS.items():
            # The significand alone: whether the exponent fits is another question.
            self.inexact[name] += int((significand.to(dtype).float() != significand).sum())

    def found(self) -> Range:
        """What was counted so far."""
        counted = sum(self.binades.values())
        shares = {name: count / counted if counted else 0.0 for name, count in self.inexact.items()}
        log2 = float(torch.tensor(self.amax, dtype=torch.float64).log2()) if self.amax else None
        named = {str(e): self.binades[e] for e in sorted(self.binades)}
        return Range(self.elements, self.zeros, self.nan, self.infinite, log2, named, shares)


def is_counted(value: object) -> bool:
    """Whether a value has a range: a float32 tensor."""
    return isinstance(value, Tensor) and value.dtype is torch.float32


def ranges_of(counters: Mapping[str, RangeCounter]) -> dict[str, Range]:
    """All of them, by the same names."""
    return {name: counter.found() for name, counter in counters.items()}
