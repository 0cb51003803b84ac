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
from functools import partial
from itertools import pairwise

from torch import Tensor

from graphopt.errors import BackendMismatchError, MismatchError
from graphopt.graph import Graph
from graphopt.model.comparison import (
    Difference,
    Observed,
    compare,
    differences,
    tolerance,
    tolerance_of_pass,
)
from graphopt.model.entries import Verification
from graphopt.model.stress import (
    SHORT,
    STEPS,
    coarsest,
    first_difference,
    no_state,
    rounding_noise,
    rounds,
)
from graphopt.model.trial import Call, Trial
from graphopt.passbase import ALGORITHM, EXACT, REASSOCIATED, Pass
from graphopt.pipeline.step import PassStep
from graphopt.plan import PlanPart

# How far generated code may be off: relative, and in multiples of what rounding the inputs makes.
GENERATED, GENERATED_NOISE = 1e-2, 64.0
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
        state: the tensor of a ``STATE`` input, by its name.
        stresses: whether exact passes are compared on large values, too.
    """

    level: str
    where: str
    trial: Trial
    forward: Call
    run: Callable[[Stage], Call]
    inputs: Sequence[Tensor]
    state: Callable[[str], Tensor] = no_state
    stresses: bool = True
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
        with self.trial.outside():
            return self._compare(stages, backend, call)

    def _compare(self, stages: Sequence[Stage], backend: str, call: Call) -> Verification:
        start = time.perf_counter()
        eager = backend == "eager"
        if eager and self.level != "full":
            wanted = self.trial.marks(self.forward)
            if wanted is not None and self.trial.marks(call) == wanted:
                self._stress(stages)
                return Verification(self.level, "bit-equal", seconds=time.perf_counter() - start)
        reference, actual = self.trial.observe(self.forward), self.trial.observe(call)
        worst = compare(reference, actual)
        alike = worst.equal and reference.streams == actual.streams
        if eager and (self.level == "full" or not alike):
            self._blame(stages, reference, actual)
        elif not eager and (self.level == "full" or self._far(reference, actual, stages)):
            last = self.trial.observe(self.run(stages[-1]))
            self._blame(stages, reference, last)
            if wrong := self._far(last, actual, stages):
                raise BackendMismatchError(
                    f"backend {backend!r} computes something else than the graph: {_words(wrong)}",
                    where=self.where,
                    hint="use backend='eager', and report the graph",
                    guilty=f"backend {backend}",
                )
        self._stress(stages)
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
        allowed = max(tolerance(reference, EXACT), self._short(stages))
        worst = self._beyond(reference, first, allowed, stages)
        if worst or reference.streams != first.streams:
            raise self._of_capture(reference, first, worst)
        exact = all(s.pass_ is None or s.pass_.numerics == EXACT for s in stages)
        if self.level != "full" and exact and compare(first, last).equal:
            return
        before = first
        for stage in stages[1:]:
            assert stage.pass_ is not None
            after = last if stage is stages[-1] else self.trial.observe(self.run(stage))
            # What lower precision rounds is measured on the graph that has it.
            lowers = stage.pass_.numerics.kind == "lowered"
            self._hold(stage.pass_, before, after, [stage] if lowers else stages)
            before = after

    def _of_capture(
        self, reference: Observed, first: Observed, worst: Difference | None
    ) -> MismatchError:
        """What is wrong with the captured graph, with its cause where that is known."""
        names = reference.streams.keys() | first.streams.keys()
        lost = [n for n in sorted(names) if reference.streams.get(n) != first.streams.get(n)]
        frozen = sorted((reference.moved | set(lost)) - {"torch's random stream"})
        if frozen:
            return MismatchError(
                f"forward {_USES.get(frozen[0]) or f'draws from {frozen[0]}'}, which a graph "
                "cannot repeat" + (f": {_words(worst)}" if worst else ""),
                where=self.where,
                hint="draw with torch (torch.rand) from its default generator, or pass what was "
                "drawn as an argument",
                guilty="capture",
            )
        words = _words(worst) if worst else "it leaves torch's random stream at another place"
        return MismatchError(
            f"the captured graph differs from eager: {words}",
            where=self.where,
            hint="please report this model; verify='structure' runs it nevertheless",
            guilty="capture",
        )

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
                guilty=f"pass {pass_.name}",
            )

    def _short(self, stages: Sequence[Stage]) -> float:
        """What rounding to the narrowest type within the graph explains, if that is a short one."""
        epsilon = coarsest(stages[0].graph)
        return 8 * epsilon if epsilon > SHORT else 0.0

    def _far(
        self, reference: Observed, actual: Observed, stages: Sequence[Stage]
    ) -> Difference | None:
        """The worst value by which code of a backend is further off than generated code may be.

        Its sums have other orders and its functions other last digits everywhere, and a ReLU may
        fall on the other side of 0: that is not one rounding.
        """
        bound = max(tolerance(reference, REASSOCIATED), self._short(stages), GENERATED)
        # Cotangents are of size 1, and sums of them that cancel are rounded as such.
        floor = 64 * coarsest(stages[0].graph) * max(1.0, _largest_gradient(reference))
        beyond = partial(
            self._beyond, reference, actual, bound, stages, GENERATED_NOISE, 0.5, floor
        )
        return beyond() and beyond(draws=len(STEPS))

    def _beyond(
        self,
        reference: Observed,
        actual: Observed,
        bound: float,
        stages: Sequence[Stage],
        times: float = 1.0,
        share: float = 0.0,
        floor: float = 0.0,
        draws: int = 1,
    ) -> Difference | None:
        """The worst value that is off by more than the bound and than rounding moves it.

        Args:
            reference: what is right.
            actual: what is compared with it.
            bound: allowed relative error; 0 allows no rounding either.
            stages: the first of them has the captured graph.
            times: how many times as much as rounding moves a value is allowed.
            share: of numbers that are no floats, how many may differ.
            floor: absolute difference that is always allowed.
            draws: see `rounding_noise`.
        """
        found = [d for d in differences(reference, actual) if d.error > bound]
        if found and bound > 0:
            noise = self._noise(stages, draws)
            places = [name for name in reference.values if name.startswith("output ")]
            named = {name: f"output {i}" for i, name in enumerate(places)}

            def moved(d: Difference) -> bool:
                allowed = max(floor, times * noise.get(named.get(d.name, _flat(d.name)), 0.0))
                no_float = d.error == float("inf")
                return d.absolute <= (max(allowed, share) if no_float else allowed)

            found = [d for d in found if not moved(d)]
        return max(found, key=lambda d: d.error, default=None)

    def _noise(self, stages: Sequence[Stage], draws: int) -> dict[str, float]:
        """How far rounding moves values in the first stage, or in one whose operators round."""
        found: dict[str, float] = {}
        for graph in (stages[0].graph, *(s.graph for s in stages[1:] if rounds(s.graph))):
            noise = rounding_noise(graph, self.inputs, self.trial, self.state, draws)
            for name, moved in noise.items():
                found[name] = max(moved, found.get(name, 0.0))
        return found

    def _stress(self, stages: Sequence[Stage]) -> None:
        """Compare exact passes, one after the other, on values far from those of this batch."""
        for exact in _runs_of_exact(stages) if self.stresses else ():
            if not first_difference(exact[0].graph, exact[-1].graph, self.inputs, self.trial):
                continue
            for before, after in pairwise(exact):
                found = first_difference(before.graph, after.graph, self.inputs, self.trial)
                if found and after.pass_ is not None:
                    raise MismatchError(
                        f"pass {after.pass_.name!r} promises exact and changes {found} on values "
                        "larger than those of this batch",
                        where=self.where,
                        hint=REPORT_IT,
                        guilty=f"pass {after.pass_.name}",
                    )


def _runs_of_exact(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages that only exact passes lie between, with the one in front of them."""
    runs = [[stages[0]]]
    for stage in stages[1:]:
        if stage.pass_ is not None and stage.pass_.numerics == EXACT:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return [run for run in runs if len(run) > 1]


# How a forward moves a stream that it does not draw from.
_USES = {"a seed": "sets a random seed"}


def _flat(name: str) -> str:
    """The name of an input as a graph has it: ``batch.ids`` is ``batch_ids`` there."""
    start = "gradient of input "
    return start + name.removeprefix(start).replace(".", "_") if name.startswith(start) else name


def _largest_gradient(observed: Observed) -> float:
    gradients = (t for n, t in observed.values.items() if n.startswith("gradient of"))
    sizes = (float(t.abs().max()) for t in gradients if t is not None and t.numel())
    return max((size for size in sizes if size < float("inf")), default=0.0)


def _words(worst: Difference) -> str:
    return f"{worst.name} has a relative error of {worst.error:.2g}"
