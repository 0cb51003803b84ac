"""What `scale_by_peak` decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.plan import PlanPart


@dataclass(frozen=True)
class Peak:
    """One activation.

    Attributes:
        name: of its node; the forward returns its largest magnitude as ``scale_by_peak/<name>``.
        parameters: whose gradients are divided by it.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Peaks(PlanPart):
    """All activations, and how long their maxima are remembered.

    Attributes:
        peaks: the activations.
        decay: what a running maximum is multiplied with in each step.
    """

    name: ClassVar[str] = "scale_by_peak"

    peaks: tuple[Peak, ...]
    decay: float
