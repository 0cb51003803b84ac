"""How the loss of a step in float16 is scaled: decided by the pass, obeyed by the runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.plan.part import PlanPart


@dataclass(frozen=True)
class LossScaling(PlanPart):
    """Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2).

    Tangents are multiplied with a power of two and gradients divided by it, so that small gradients
    do not vanish in float16 on their way. The defaults are those of ``torch.amp.GradScaler``.

    Attributes:
        initial: the first scale.
        factor: by which it grows, and shrinks where a gradient is not finite.
        interval: steps in a row with finite gradients after which it grows.
        least: below it gradients are not finite for other reasons than their scale.
    """

    name: ClassVar[str] = "precision"

    initial: float = 2.0**16
    factor: float = 2.0
    interval: int = 2000
    least: float = 1.0
