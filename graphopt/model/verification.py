"""What will run, compared with PyTorch eager; a difference is traced to the one who made it.

The comparison is of the graph after all passes, in the chosen backend. Where it is bit-equal,
nothing else has to run. Where it is not, the graphs that the passes have left behind run one after
the other, each held to what its pass promises. Bits that agree on one batch may still hide a pass
that is wrong elsewhere, so exact passes are also compared on values that no batch is likely to
have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from graphopt.errors import MismatchError
from graphopt.graph import Graph
from graphopt.model.entries import Verification
from graphopt.model.stress import first_difference, rounding_noise
from graphopt.model.trial import (
    Call,
    Difference,
    Observed,
    Trial,
    compare,
    differences,
    tolerance,
    tolerance_of_pass,
)
from graphopt.passbase import ALGORITHM, EXACT, REASSOCIATED, Pass
from graphopt.pipeline.step import PassStep
from graphopt.plan import PlanPart

# How many times more than by a change of the inputs' last digits a gradient may move, where many
# values were rounded and not only the inputs.
NOISE = 64.0
REPORT_IT = "run the pipeline without this pass, and report it to its author"


@dataclass(frozen=True)
class Stage:
    """The graph as one pass has left it.

    Attributes:
        pass_: which one; ``None`` for the captured graph.
        graph: a copy.
        parts: what the passes so far have decided.
    """

    pass_: Pass | None
    graph: Graph
    parts: tuple[PlanPart, ...]


@dataclass
class Stages:
    """Observer of a pipeline that keeps the graph after each pass that changed it."""

    stages: list[Stage] = field(default_factory=list)

    @classmethod
    def of(cls, captured: Graph) -> Stages:
        """Begin with the captured graph."""
        return cls([Stage(None, captured.copy(), ())])

    def __call__(self, index: int, pass_: Pass, graph: Graph, step: PassStep) -> None:
        """See `graphopt.pipeline.Observer`."""
        part = step.outcome.part
        if not step.outcome.changed and part is None:
            return
        parts = self.stages[-1].parts + ((part,) if part is not None else ())
        self.stages.append(Stage(pass_, graph.copy(), parts))


@dataclass
class Check:
    """One verification.

    Args:
        level: ``"eager"`` or ``"full"``.
        where: the call that it is about, in words.
        trial: the user's own step.
        forward: the model's own forward.
        run: makes a call of the model from a stage, in the eager backend.
        inputs: tensors of the call as the captured graph takes them.
    """

    level: str
    where: str
    trial: Trial
    forward: Call
    run: Callable[[Stage], Call]
    inputs: Sequence[Tensor]
    declined: list[str] = field(default_factory=list)

    def __call__(self, stages: Sequence[Stage], backend: str, call: Call) -> Verification:
        """Compare with eager.

        Args:
            stages: what the passes have left, from the captured graph on.
            backend: what runs the last of them.
            call: what will run.

        Raises:
            MismatchError: the capture, a pass or the backend is wrong.
        """
        start = time.perf_counter()
        reference = self.trial.observe(self.forward)
        eager = backend == "eager"
        last = self.trial.observe(call if eager else self.run(stages[-1]))
        actual = last if eager else self.trial.observe(call)
        if self.level == "full" or not compare(reference, last).equal:
            self._blame(stages, reference, last)
        if not eager:
            self._blame_backend(backend, last, actual, stages)
        self._stress(stages)
        worst = compare(reference, actual)
        return Verification(
            level=self.level,
            result="bit-equal" if worst.equal else "within tolerance",
            worst_name=worst.name,
            worst_error=worst.error,
            seconds=time.perf_counter() - start,
            declined=tuple(self.declined),
        )

    def _blame(self, stages: Sequence[Stage], reference: Observed, last: Observed) -> None:
        """Hold each stage to what its pass promises, against the stage before it."""
        # Most often it is the capture alone that differs, by its rounding.
        first = last if len(stages) == 1 else self.trial.observe(self.run(stages[0]))
        worst = self._beyond(reference, first, tolerance(reference, EXACT), stages)
        if worst:
            raise MismatchError(
                f"the captured graph differs from eager: {_words(worst)}",
                where=self.where,
                hint="please report this model; verify='structure' runs it nevertheless",
            )
        exact = all(s.pass_ is None or s.pass_.numerics == EXACT for s in stages)
        if self.level != "full" and exact and compare(first, last).equal:
            return
        before = first
        for stage in stages[1:]:
            assert stage.pass_ is not None
            after = last if stage is stages[-1] else self.trial.observe(self.run(stage))
            self._hold(stage.pass_, before, after, stages)
            before = after

    def _hold(
        self, pass_: Pass, before: Observed, after: Observed, stages: Sequence[Stage]
    ) -> None:
        if pass_.numerics == ALGORITHM:
            if not compare(before, after).equal:
                self.declined.append(pass_.name)
            return
        worst = self._beyond(before, after, tolerance_of_pass(after, pass_.numerics), stages)
        if worst:
            raise MismatchError(
                f"pass {pass_.name!r} promises {pass_.numerics} and is wrong: {_words(worst)}",
                where=self.where,
                hint=REPORT_IT,
            )

    def _blame_backend(
        self, backend: str, last: Observed, actual: Observed, stages: Sequence[Stage]
    ) -> None:
        worst = self._beyond(last, actual, tolerance(last, REASSOCIATED), stages)
        if worst:
            raise MismatchError(
                f"backend {backend!r} computes something else than the graph: {_words(worst)}",
                where=self.where,
                hint="use backend='eager', and report the graph",
            )

    def _beyond(
        self, reference: Observed, actual: Observed, bound: float, stages: Sequence[Stage]
    ) -> Difference | None:
        """The worst value that is off by more than the bound and than rounding moves it."""
        found = [d for d in differences(reference, actual) if d.error > bound]
        if found and bound > 0:
            noise = rounding_noise(stages[0].graph, self.inputs, self.trial)
            found = [d for d in found if not d.absolute <= NOISE * noise.get(d.name, 0.0)]
        return max(found, key=lambda d: d.error, default=None)

    def _stress(self, stages: Sequence[Stage]) -> None:
        """Compare exact passes on values far from those of this batch."""
        if len(stages) == 1 or any(s.pass_ and s.pass_.numerics != EXACT for s in stages):
            return
        first, last = stages[0], stages[-1]
        if not first_difference(first.graph, last.graph, self.inputs, self.trial):
            return
        for before, after in pairwise(stages):
            found = first_difference(before.graph, after.graph, self.inputs, self.trial)
            if found and after.pass_ is not None:
                raise MismatchError(
                    f"pass {after.pass_.name!r} promises exact and changes {found} on values "
                    "larger than those of this batch",
                    where=self.where,
                    hint=REPORT_IT,
                )


def _words(worst: Difference) -> str:
    return f"{worst.name} has a relative error of {worst.error:.2g}"
