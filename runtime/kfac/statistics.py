"""Two forms of one backward: one computes the statistics of the curvature, too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphopt.plan import Plan, Role, Slot
from graphopt.plan.kfac import Curvature
from graphopt.runtime.engine.compared import Pair
from graphopt.runtime.engine.forms import keeping
from graphopt.runtime.engine.step import Backward, Forward, Half, MakeBackward, Step
from graphopt.runtime.kfac.labels import tangents_of_labels
from graphopt.runtime.kfac.state import CurvatureState
from graphopt.runtime.session import Session

PREFIX = "kfac/"
# Under these a step keeps the model's first output, and what its backward has found.
OUTPUT, FOUND = "kfac/output", "kfac/found"


@dataclass(frozen=True)
class Found:
    """What one backward leaves for the end of its step.

    Attributes:
        curvature: of the model.
        plan: of the step.
        statistics: by name; empty where none are due.
        due: names of the statistics that this step renews.
        own: names of all that this backward can compute: of a stage those of its own layers.
        sampled: whether they come from labels of the model's own.
    """

    curvature: CurvatureState
    plan: Plan
    statistics: dict[str, Tensor]
    due: set[str]
    own: frozenset[str]
    sampled: bool


def is_statistic(slot: Slot) -> bool:
    """Whether an output of a half is a statistic of the curvature."""
    return slot.role is Role.AUX and slot.name.startswith(PREFIX)


class KeepingOutput:
    """A forward whose first output is kept: labels are drawn from it."""

    def __init__(self, inner: Forward) -> None:
        self.returns = inner.returns
        self._inner = inner
        roles = [(s.role, s.name) for s in inner.returns]
        self._first = roles.index((Role.OUTPUT, "0")) if (Role.OUTPUT, "0") in roles else None

    def __call__(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        """See `Forward`."""
        results = self._inner(step, inputs)
        if self._first is not None:
            step.own[OUTPUT] = results[self._first].detach()
        return results


class WithStatistics:
    """The backward of a step whose gradients are preconditioned.

    Args:
        part: what to obey.
        plan: of the step.
        curvature: says which statistics are due.
        half: the backward half, with statistics among its outputs.
        below: makes the backward of a form.
        session: of the model.
    """

    def __init__(
        self,
        part: Curvature,
        plan: Plan,
        curvature: CurvatureState,
        half: Half,
        below: MakeBackward,
        session: Session,
    ) -> None:
        self.part, self.plan, self.curvature = part, plan, curvature
        self._pair = Pair(session, part.name, plan.backend)
        self._half, self._below = half, below
        names = (slot.name for slot in half.slots if is_statistic(slot))
        self._own = frozenset(name.removeprefix(PREFIX) for name in names)
        self._plain = below(keeping(half, lambda s: not is_statistic(s)))
        self.returns = self._plain.returns
        self._full: Backward | None = None
        self._only: Backward | None = None
        tangents = plan.signature.names(Role.TANGENT)
        self._labelled = tangents.index("0") if "0" in tangents else None
        # What a backend asks of sizes is a condition of the graph while that is built, not later.
        if plan.signature.names(Role.SIZE):
            _ = self._with if part.fisher == "empirical" else self._alone

    @property
    def _with(self) -> Backward:
        """The form that computes the statistics, too."""
        if self._full is None:
            self._full = self._below(self._half)
        return self._full

    @property
    def _alone(self) -> Backward:
        """The form that computes statistics only."""
        if self._only is None:
            self._only = self._below(keeping(self._half, is_statistic))
        return self._only

    def __call__(
        self, step: Step, tangents: Sequence[Tensor | None], absent: Collection[str]
    ) -> list[Any]:
        """Run the form that is due."""
        due = self.curvature.due() & self._own
        output = step.own.get(OUTPUT)
        statistics: dict[str, Tensor] = {}
        if due and output is not None:
            statistics = self._of_labels(step, output, len(tangents))
        with_them = bool(due) and output is None
        if output is None and self._pair.wants(with_them, step):
            self._pair.compare(self._plain, self._with, step, tangents, absent)
        if with_them or (output is None and self._pair.distrusts):
            results, statistics = self._with_statistics(step, tangents, absent)
            statistics = statistics if with_them else {}
        else:
            results = self._plain(step, tangents, absent)
        step.own[FOUND] = Found(
            self.curvature, self.plan, statistics, due, self._own, output is not None
        )
        return results

    def _with_statistics(
        self, step: Step, tangents: Sequence[Tensor | None], absent: Collection[str]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        found = zip(self._with.returns, self._with(step, tangents, absent), strict=True)
        results, statistics = [], {}
        for slot, value in found:
            if is_statistic(slot):
                statistics[slot.name.removeprefix(PREFIX)] = value
            else:
                results.append(value)
        return results, statistics

    def _of_labels(self, step: Step, output: Tensor, tangents: int) -> dict[str, Tensor]:
        """Statistics of gradients for other labels than the given ones, averaged or summed."""
        total: dict[str, Tensor] = {}
        saved = list(step.saved)
        for tangent in tangents_of_labels(self.part, output):
            given: list[Tensor | None] = [None] * tangents
            if self._labelled is not None:
                given[self._labelled] = tangent.expand_as(output).contiguous()
            step.saved = list(saved)
            self._add(total, self._alone(step, given, ()))
        step.saved = saved
        return total

    def _add(self, total: dict[str, Tensor], found: Sequence[Any]) -> None:
        """Moments of output gradients add up over labels; those of inputs do not depend on them."""
        for slot, value in zip(self._alone.returns, found, strict=True):
            name = slot.name.removeprefix(PREFIX)
            if name not in total:
                total[name] = value
            elif self.curvature.is_of_gradients(name):
                total[name] = self.curvature.sum(name, (total[name], value))
