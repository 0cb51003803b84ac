"""Comparisons with eager of one captured kind of call: the first one, and those of later calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graphopt.capture import Capture
from graphopt.model.entries import Verification
from graphopt.model.levels import Verify
from graphopt.model.trial import Call, Trial, describe_call
from graphopt.model.verification import Check, Stage, Stages

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

Args = Sequence[Any]
Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class Comparing:
    """What it takes to compare calls of one kind with eager.

    Attributes:
        captured: how the first of them was captured.
        stages: what the passes have left.
        session: of the model.
        forward: the model's own.
        verify: how much is compared.
        run: makes a call of the model from a capture and a stage, in the eager backend.
    """

    captured: Capture
    stages: Stages
    session: Session
    forward: Call
    verify: Verify
    run: Callable[[Capture, Stage], Call]

    def first(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Check:
        """Of the call that was captured."""
        return self._check(model, args, kwargs, self.captured.inputs, stresses=True)

    def forgetful(self) -> Comparing:
        """The same, without the tensors of the call that was captured."""
        return replace(self, captured=replace(self.captured, inputs=()))

    def later(
        self, model: nn.Module, args: Args, kwargs: Kwargs, backend: str, call: Call
    ) -> Verification:
        """Compare another call.

        Args:
            model: the model.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            backend: what runs it.
            call: runs it.

        Raises:
            MismatchError: a pass or the backend is wrong.
        """
        taken: list[Tensor] = []

        def take(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            taken[:] = inputs
            raise _Taken

        check = self._check(model, args, kwargs, taken, stresses=False)
        with check.trial.without_trace(), contextlib.suppress(_Taken):
            self.captured.bind(take)(model, *args, **kwargs)
        return check(self.stages.stages, backend, call)

    def _check(
        self,
        model: nn.Module,
        args: Args,
        kwargs: Kwargs,
        inputs: Sequence[Tensor],
        *,
        stresses: bool,
    ) -> Check:
        session, level = self.session, self.verify.level
        around = session.watched_trial if level == "full" else session.trial
        return Check(
            level,
            describe_call(model, args, kwargs),
            Trial(model, args, kwargs, around),
            self.forward,
            partial(self.run, self.captured),
            inputs,
            session.states.tensor,
            stresses,
        )


class _Taken(Exception):
    """The inputs of a graph are taken, and nothing has to run."""
