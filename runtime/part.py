"""What a method does while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, fx

from graphopt.errors import StateError
from graphopt.plan import Plan, PlanPart
from graphopt.runtime.engine.step import MakeBackward, MakeForward, Step
from graphopt.runtime.session import Session

P = TypeVar("P", bound=PlanPart)

MakeEngine = Callable[[fx.GraphModule, Plan], Callable[..., Any]]


class RuntimePart(Generic[P]):
    """One method on one model; it obeys the plan part of the same name.

    Parts nest in pipeline order, the first pass outermost; `finish` runs innermost first. A part
    keeps what lives longer than a step in `state`, and changes it in `finish` only: then saving,
    copying, trials and verification work without knowing the part.

    Args:
        session: of the model.

    Class attributes:
        name: the name of the pass.
        version: that of the plan parts which it obeys.
        methods: names of methods of this class that the optimized model gets, too.
        accepts_early: whether `accepts` has something to say without any plan part.
        state: this part's tensors by name; the part's namespace in the model's session.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    methods: ClassVar[tuple[str, ...]] = ()
    accepts_early: ClassVar[bool] = False

    def __init__(self, session: Session) -> None:
        self.session = session
        self.state: dict[str, Tensor] = session.state(self.name)

    def unscaled(self) -> None:
        """Leave the scale of tangents to others from now on.

        Called where the user's own scaler multiplies the loss, and when a trial begins, whose
        tangents are no loss's.
        """

    def unstaged(self, part: P, per_rank: int) -> str:
        """Why it cannot work where a step runs in stages; empty if it can.

        Each stage then is a step of its own, with the results and gradients that are its own.

        Args:
            part: what was decided.
            per_rank: stages on each rank.
        """
        return ""

    def uncompared(self, part: P) -> Mapping[str, str]:
        """What of its work no comparison with eager holds, and why."""
        return {}

    # -- while a step runs -------------------------------------------------------------------------

    def forward(self, part: P, plan: Plan, below: MakeForward) -> MakeForward:
        """Surround the forward half; a part takes its own ``AUX`` results off."""
        return below

    def backward(self, part: P, plan: Plan, below: MakeBackward) -> MakeBackward:
        """Surround the backward half; a part takes its own ``AUX`` results off."""
        return below

    def engine(self, part: P, plan: Plan, below: MakeEngine) -> MakeEngine:
        """Surround, or replace, what runs the whole step."""
        return below

    def finishes(self, part: P) -> bool:
        """Whether `finish` has anything to do."""
        return type(self).finish is not RuntimePart.finish

    def finish(self, part: P, step: Step, gradients: dict[str, Tensor]) -> None:
        """After each backward: renew the state, and change gradients where the step ends.

        Args:
            part: what was decided.
            step: whose backward has run.
            gradients: of the parameters that have one, by name; of a step that ends, over all its
                micro-batches, and where it runs in stages, empty before. Replace entries; two
                gradients may be one tensor, or the tangent itself, so that changes in place would
                show elsewhere.
        """

    # -- saving and reporting ----------------------------------------------------------------------

    def settle(self) -> None:
        """Have in the state what a step has left to arrive later."""

    def accepts(self, parts: Sequence[P], saved: Mapping[str, Tensor]) -> None:
        """Whether a saved state of this namespace may be continued from; changes nothing.

        Args:
            parts: the plan parts of this method that the model's kinds of calls have so far.
            saved: tensors of the namespace by name.

        Raises:
            StateError: it is not; by default where its names, shapes or dtypes differ from the
                present state, if there is one.
        """
        check_like(self.name, self.state, saved)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from a saved state, which was accepted; the tensors are this part's to keep."""
        self.state.clear()
        self.state.update(saved)

    def gather(self) -> dict[str, Tensor]:
        """The state of all ranks together; the same on each where they divide it."""
        return dict(self.state)

    def own(self) -> dict[str, Tensor]:
        """This rank's share of the state; nothing is sent, and all shares together are `gather`."""
        return dict(self.state)

    def joined(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of all methods, where this one has several ranks keep parts of it.

        Args:
            state: what `gather` of all methods gives on this rank, by ``"<pass>/<name>"``.
        """
        return state

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        return ()

    def copy(self, session: Session) -> Self:
        """For a copy of the model, whose state was copied already."""
        return type(self)(session)

    # -- what models get ---------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager[None]:
        """Within, steps keep this rank's own gradients; the next step outside takes them all."""
        return self.session.no_sync()


def check_like(name: str, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Whether saved tensors have the names, shapes and dtypes of a state that is not empty.

    Raises:
        StateError: they have not, naming the first difference.
    """
    if not own:
        return
    for key in sorted(own.keys() | saved.keys()):
        if key not in saved:
            raise StateError(
                f"the saved state lacks '{name}/{key}'", hint="use the passes it was saved with"
            )
        if key not in own:
            raise StateError(
                f"the saved state has '{name}/{key}' too many", hint="load the state of this model"
            )
        if saved[key].shape != own[key].shape:
            raise StateError(
                f"'{name}/{key}' has shape {tuple(saved[key].shape)} in the saved state and "
                f"{tuple(own[key].shape)} here",
                hint="load the state of this model",
            )
        check_dtype(f"{name}/{key}", saved[key], own[key].dtype)


def check_dtype(key: str, found: Tensor, wanted: torch.dtype) -> None:
    """Whether a saved tensor has the dtype that is needed.

    Raises:
        StateError: it has not; names both.
    """
    if found.dtype != wanted:
        raise StateError(
            f"{key!r} has dtype {str(found.dtype)[6:]} in the saved state and {str(wanted)[6:]} "
            "here",
            hint="load the state of this model, as it was saved",
        )
