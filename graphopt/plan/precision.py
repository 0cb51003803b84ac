"""How the loss of a step in float16 is scaled: decided by the pass, obeyed by the runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from graphopt.plan.limits import OneOrMore, Within
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

    initial: Annotated[float, Within(1.0, 2.0**120)] = 2.0**16
    factor: Annotated[float, Within(1.0, 2.0**120)] = 2.0
    interval: OneOrMore = 2000
    least: Annotated[float, Within(1.0, 2.0**120)] = 1.0

    def __post_init__(self) -> None:
        for name in ("initial", "factor", "least"):
            if math.frexp(getattr(self, name))[0] != 0.5:
                raise ValueError(f"{name} is {getattr(self, name)}, which is no power of two")
