"""Which tensors of a step are flex tensors, and how their exponents follow: decided by the pass.

A flex tensor is a tensor of integers with one exponent (`graphopt.ops.flex`). Each tensor that gets
an exponent of its own has one row in every vector of the method's state and statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    forward: int
    elements: tuple[int, ...]
    mantissa: int
    least: int
    most: int
    autoflex: str
    stochastic: bool
    weights: dict[str, int]
