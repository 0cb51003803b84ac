"""Which batch norms evaluate with the statistics of the last steps: decided by the pass.

The forward returns two values per use of a norm, its batch's mean and ``1 / sqrt(var + eps)``, as
``AUX`` results. How many values a channel has is part of their names and not of the plan part:
ranks must agree on plan parts, and the last batch of one of them may be smaller. Where sizes are
symbols, the forward returns it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.plan.limits import Count, NotNegative, OneOrMore
from graphopt.plan.part import PlanPart
from graphopt.plan.signature import Role, Slot

_PASS = "batch_statistics"
MEAN, INVERSE, COUNT = "mean", "inverse", "count"
_VARIES = "varies"


@dataclass(frozen=True)
class Norm:
    """One batch norm.

    Attributes:
        mean, var: its buffers.
        channels: elements of each.
        eps: what each of its uses in a forward adds to the variance.
    """

    mean: str
    var: str
    channels: Count
    eps: tuple[NotNegative, ...]


@dataclass(frozen=True)
class Norms(PlanPart):
    """All of them.

    Attributes:
        norms: one per buffer of means.
        last: over how many steps statistics are taken together.
    """

    name: ClassVar[str] = _PASS

    norms: tuple[Norm, ...]
    last: OneOrMore


@dataclass(frozen=True)
class Statistic:
    """What one ``AUX`` result is.

    Attributes:
        what: `MEAN`, `INVERSE`, or `COUNT` of the values per channel, float64 of no dimension.
        use: number of the use of its norm.
        values: per channel that it was computed from; ``None`` where `COUNT` tells.
        norm: the norm's buffer of means.
    """

    what: str
    use: int
    values: int | None
    norm: str

    @property
    def slot(self) -> Slot:
        """Where the forward returns it."""
        values = _VARIES if self.values is None else self.values
        return Slot(Role.AUX, f"{_PASS}/{self.what}/{self.use}/{values}/{self.norm}")

    @classmethod
    def of(cls, slot: Slot) -> Statistic | None:
        """The inverse of `slot`; ``None`` for anything else."""
        if slot.role is not Role.AUX or not slot.name.startswith(f"{_PASS}/"):
            return None
        _, what, use, values, norm = slot.name.split("/", 4)
        return cls(what, int(use), None if values == _VARIES else int(values), norm)
