"""Methods with a plan part and a runtime part, right and wrong ones, offered as plugins.

All of them divide gradients by the number of steps so far; each wrong one breaks one rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from graphopt.graph import Graph
from graphopt.passbase import ALGORITHM, Applied, Numerics, Outcome, Pass, PassContext
from graphopt.plan import Plan, PlanPart, Role
from graphopt.runtime.engine.step import MakeBackward, MakeForward, Step
from graphopt.runtime.part import MakeEngine, RuntimePart
from graphopt.runtime.session import Session


@dataclass(frozen=True)
class Cool(PlanPart):
    """Whose gradients are divided."""

    parameters: tuple[str, ...] = ()


class Right(RuntimePart[Cool]):
    """Keeps every rule."""

    methods: ClassVar[tuple[str, ...]] = ("no_sync", "steps_so_far")

    def steps_so_far(self, times: int = 1) -> int:
        """How many steps have ended."""
        return times * int(self.state.get("steps", 0))

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        if step.ends:
            self.state["steps"] = self.state.get("steps", torch.zeros(())) + 1
            self.divide(part, gradients, float(self.state["steps"]))

    def divide(self, part: Cool, gradients: dict[str, Tensor], by: float) -> None:
        for name in part.parameters:
            if name in gradients:
                gradients[name] = gradients[name] / by


class ChangesInForward(Right):
    def forward(self, part: Cool, plan: Plan, below: MakeForward) -> MakeForward:
        def make(half: Any) -> Any:
            inner = below(half)

            class Counting:
                returns = inner.returns

                def __call__(_, step: Step, inputs: list[Any]) -> Sequence[Any]:
                    self.state["calls"] = self.state.get("calls", torch.zeros(())) + 1
                    return inner(step, inputs)

            return Counting()

        return make


class ChangesAnother(Right):
    """Changes what belongs to `right`."""

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        self.session.state("right")["steps"] = torch.full((), 7.0)


class CountsTrials(Right):
    calls = 0

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        self.calls += 1
        if step.ends:
            self.divide(part, gradients, self.calls)


class ForgetsToSave(Right):
    steps = 0

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        self.steps += step.ends
        if step.ends:
            self.divide(part, gradients, self.steps)


class SharesWithCopies(Right):
    def copy(self, session: Session) -> Self:
        other = super().copy(session)
        other.state = self.state
        return other


class DividesMicroBatches(Right):
    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        super().finish(part, step, gradients)
        if not step.ends:
            self.divide(part, gradients, 2)


class CountsMicroBatches(Right):
    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        self.state["steps"] = self.state.get("steps", torch.zeros(())) + 1
        if step.ends:
            self.divide(part, gradients, float(self.state["steps"]))


class IsAlone(Right):
    """Divides by something that only this rank knows."""

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        super().finish(part, step, gradients)
        ranks = self.session.ranks.get("dp")
        if step.ends and ranks is not None:
            self.divide(part, gradients, 1 + ranks.group.rank())


class HasOtherMethod(Right):
    def steps_so_far(self, times: int = 1) -> int:
        return -1


class OfAnotherVersion(Right):
    version: ClassVar[int] = 2


EVENTS: list[tuple[str, str]] = []
STEPS: list[tuple[Step, dict[str, Tensor]]] = []


class Records(Right):
    """Tells when it is called, and with what."""

    def _around(self, hook: str, below: Any) -> Any:
        def make(half: Any) -> Any:
            inner = below(half)

            class Around:
                returns = inner.returns

                def __call__(_, *args: Any) -> Any:
                    EVENTS.append((self.name, f"{hook} begins"))
                    results = inner(*args)
                    EVENTS.append((self.name, f"{hook} ends"))
                    return results

            return Around()

        return make

    def forward(self, part: Cool, plan: Plan, below: MakeForward) -> MakeForward:
        return self._around("forward", below)  # type: ignore[no-any-return]

    def backward(self, part: Cool, plan: Plan, below: MakeBackward) -> MakeBackward:
        return self._around("backward", below)  # type: ignore[no-any-return]

    def engine(self, part: Cool, plan: Plan, below: MakeEngine) -> MakeEngine:
        def make(module: Any, plan: Plan) -> Any:
            run = below(module, plan)

            def call(inputs: Any) -> Any:
                EVENTS.append((self.name, "step begins"))
                outputs = run(inputs)
                EVENTS.append((self.name, "step ends"))
                return outputs

            return call

        return make

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        EVENTS.append((self.name, "finish"))
        STEPS.append((step, dict(gradients)))


class Drops(Right):
    """Leaves the first gradient out."""

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        gradients.pop(part.parameters[0], None)


class NeverFinishes(Right):
    def finishes(self, part: Cool) -> bool:
        return False

    def finish(self, part: Cool, step: Step, gradients: dict[str, Tensor]) -> None:
        raise AssertionError("nobody should have asked")


class ReturnsTooFew(Right):
    """Leaves something out of what one of its hooks returns."""

    hook = "forward"
    what = "results"

    def _short(self, hook: str, below: Any) -> Any:
        if hook != self.hook:
            return below
        if self.what == "maker":
            return None

        def make(half: Any, *plan: Any) -> Any:
            inner = below(half, *plan)
            if plan:
                return lambda *args: inner(*args)[:-1]

            class Short:
                returns = inner.returns[1:] if self.what == "returns" else inner.returns

                def __call__(_, *args: Any) -> Any:
                    return None if self.what == "all" else inner(*args)[:-1]

            return Short()

        return make

    def forward(self, part: Cool, plan: Plan, below: MakeForward) -> MakeForward:
        return self._short("forward", below)  # type: ignore[no-any-return]

    def backward(self, part: Cool, plan: Plan, below: MakeBackward) -> MakeBackward:
        return self._short("backward", below)  # type: ignore[no-any-return]

    def engine(self, part: Cool, plan: Plan, below: MakeEngine) -> MakeEngine:
        return self._short("engine", below)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Method(Pass):
    """Leaves the graph alone; all happens when a step ends."""

    numerics: ClassVar[Numerics] = ALGORITHM
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    part: ClassVar[type[Cool]]

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        names = set(graph.signature.names(Role.GRAD)) & set(graph.signature.names(Role.PARAM))
        done = tuple(Applied(name, "cooled") for name in sorted(names))
        return Outcome(done, part=self.part(tuple(sorted(names))))


def _method(name: str, runtime: type[Right]) -> dict[str, type]:
    """The classes of a method, under names by which this module has them."""

    def derived(base: type, suffix: str, **own: Any) -> type:
        qualified = f"{name}_{suffix}"
        body = {"name": name, "__module__": __name__, "__qualname__": qualified, **own}
        return type(qualified, (base,), body)

    part = dataclass(frozen=True)(derived(Cool, "plan"))
    pass_ = dataclass(frozen=True)(derived(Method, "pass", part=part))
    found = {"pass": pass_, "plan": part, "runtime": derived(runtime, "runtime")}
    globals().update({f"{name}_{kind}": value for kind, value in found.items()})
    return found


METHODS = {
    "right": _method("right", Right),
    "changes_in_forward": _method("changes_in_forward", ChangesInForward),
    "changes_another": _method("changes_another", ChangesAnother),
    "counts_trials": _method("counts_trials", CountsTrials),
    "forgets_to_save": _method("forgets_to_save", ForgetsToSave),
    "shares_with_copies": _method("shares_with_copies", SharesWithCopies),
    "divides_micro_batches": _method("divides_micro_batches", DividesMicroBatches),
    "counts_micro_batches": _method("counts_micro_batches", CountsMicroBatches),
    "is_alone": _method("is_alone", IsAlone),
    "has_other_method": _method("has_other_method", HasOtherMethod),
    "of_another_version": _method("of_another_version", OfAnotherVersion),
    "records": _method("records", Records),
    "records_too": _method("records_too", Records),
    "drops": _method("drops", Drops),
    "returns_too_few": _method("returns_too_few", ReturnsTooFew),
    "never_finishes": _method("never_finishes", NeverFinishes),
}

GROUPS = {
    "graphopt.passes": "pass",
    "graphopt.plan_parts": "plan",
    "graphopt.runtime_parts": "runtime",
}


def write_methods(
    folder: Path, *, name: str = "demo-methods", leave_out: Sequence[tuple[str, str]] = ()
) -> Path:
    """A distribution with all methods, but for some pairs of method and kind."""
    info = folder / f"{name.replace('-', '_')}-1.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.3\n")
    lines = []
    for group, kind in GROUPS.items():
        kept = [method for method in METHODS if (method, kind) not in leave_out]
        lines += [f"[{group}]", *(f"{m} = {__name__}:{m}_{kind}" for m in kept)]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
    return folder
