"""How gradients are reduced over ranks: decided by the pass, obeyed by the runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from graphopt.plan.grouping import Grouping
from graphopt.plan.limits import OneOf, Positive
from graphopt.plan.part import PlanPart


@dataclass(frozen=True)
class Reduction(PlanPart):
    """The groups of one backward, and what travels.

    Attributes:
        grouping: which gradients are reduced together.
        wire: what travels: ``"native"``, ``"bf16"`` or ``"int32"``.
        stale: whose reduced gradients a step returns: ``"none"`` its own, ``"double_buffer"`` and
            ``"lag"`` those of the step before.
        scale: factor on the incoming tangents of a backward that reduces; the mean over ranks is
            taken here, once, where the backward is linear in them.
        at_end: whether a step reduces when it ends, not within its backward: its stages have one
            each.
    """

    name: ClassVar[str] = "group_gradients"

    grouping: Grouping
    wire: Annotated[str, OneOf(("native", "bf16", "int32"))] = "native"
    stale: Annotated[str, OneOf(("none", "double_buffer", "lag"))] = "none"
    scale: Positive = 1.0
    at_end: bool = False
