"""Which tensors of a step are flex tensors, and how their exponents follow: decided by the pass.

A flex tensor is a tensor of integers with one exponent (`graphopt.ops.flex`). Each tensor that gets
an exponent of its own has one row in every vector of the method's state and statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from graphopt.plan.limits import Count, OneOf, Within
from graphopt.plan.part import PlanPart


@dataclass(frozen=True)
class FlexTensors(PlanPart):
    """All tensors with an exponent of their own, those of the forward half first.

    Attributes:
        key: digest of `names`. The state input ``flexpoint/exponents/<key>``, int32 [n], holds the
            exponents; the outputs ``flexpoint/forward`` and ``flexpoint/backward``, int32 [k, 4],
            the statistics that `graphopt.ops.flex` defines.
        names: of the tensors, by row.
        forward: how many of them are the forward's.
        elements: of each tensor; 0 where data decide it.
        mantissa: bits of a mantissa, sign included.
        least: smallest exponent that a prediction may give.
        most: largest one.
        autoflex: the rule by which exponents follow, see `graphopt.runtime.flexpoint.autoflex`.
        stochastic: whether elements are rounded at random, with the state input ``flexpoint/seed``.
        weights: rows of the parameters that hold flex values themselves, by their names.
    """

    name: ClassVar[str] = "flexpoint"

    key: str
    names: tuple[str, ...]
    forward: Count
    elements: tuple[Count, ...]
    mantissa: Annotated[int, Within(2, 32)]
    least: Annotated[int, Within(-1 << 15, 1 << 15)]
    most: Annotated[int, Within(-1 << 15, 1 << 15)]
    autoflex: Annotated[str, OneOf(("paper", "code2016", "delayed", "current"))]
    stochastic: bool
    weights: dict[str, Count]

    def __post_init__(self) -> None:
        count = len(self.names)
        if len(self.elements) != count or self.forward > count:
            raise ValueError(f"{count} names, {len(self.elements)} sizes, {self.forward} forward")
        if self.least > self.most:
            raise ValueError(f"no exponent is between {self.least} and {self.most}")
        if wrong := [name for name, row in self.weights.items() if row >= count]:
            raise ValueError(f"{wrong[0]!r} has a row that there is not")
