"""The comparison with eager, repeated while a model trains.

Every so many steps the call that begins a step runs three times: twice on stand-ins, in eager and
as it is optimized, and then for the user, who notices nothing but the time. All ranks of a job do
so before the same step, each on its own batch, and hear what the others have found.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.capture.lock import one_at_a_time
from graphopt.errors import MismatchError
from graphopt.model.entries import Samples, Specialisation, Verification
from graphopt.model.plain import run_plain
from graphopt.model.variant import Telling, Variant
from graphopt.notices import warn

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")

# Under which ranks tell each other.
TOPIC = "samples"
PLAINLY = "calls like this one run as plain PyTorch from now on"

Compare = Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], Verification]
Renew = Callable[[MismatchError | None, nn.Module, Sequence[Any], Mapping[str, Any]], "Renewed"]


@dataclass(frozen=True)
class Renewed:
    """What runs in place of what was found wrong.

    Attributes:
        call: of the model.
        warnings: what the user has to be told.
        variant: whose call it is; ``None`` for plain PyTorch.
    """

    call: Callable[..., object]
    warnings: tuple[str, ...]
    variant: Variant | None = None


def plainly(
    session: Session, forward: Callable[..., object], error: MismatchError, on_mismatch: str
) -> Renewed:
    """Calls of the model as plain PyTorch."""

    def call(model: nn.Module, *args: Any, **kwargs: Any) -> object:
        return run_plain(session, forward, model, args, kwargs)

    return Renewed(call, (f"{PLAINLY} (on_mismatch={on_mismatch!r}): {error}",))


@dataclass
class Sampled:
    """A call of a model that is compared with eager every so many steps.

    Args:
        call: what runs.
        compare: with eager, leaving no trace; raises `MismatchError`.
        renew: what runs after a mismatch, or after one of another variant; raises it where nothing
            may.
        session: of the model.
        every: steps between two comparisons.
        trains: whether calls are steps, which all ranks make; others are counted here.

    Attributes:
        samples: what was found.
        renewed: what has taken the place of this call.
    """

    call: Callable[..., object]
    compare: Compare
    renew: Renew
    session: Session
    every: int
    trains: bool

    def __post_init__(self) -> None:
        self.samples = Samples(self.every)
        self.renewed: Renewed | None = None
        self._calls = 0
        self._distrusted = len(self.session.distrusted)

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> object:
        """Run the call; compare before, where that is due."""
        if self.renewed is not None:
            return self.call(model, *args, **kwargs)
        if self._distrusted != len(self.session.distrusted):
            with one_at_a_time():
                self._renew(None, model, args, kwargs)
        if self._due():
            with one_at_a_time():
                self._sample(model, args, kwargs)
        return self.call(model, *args, **kwargs)

    def reported(self, entry: Specialisation) -> Specialisation:
        """The entry, with how comparisons came out and what runs instead."""
        entry, renewed = replace(entry, samples=self.samples), self.renewed
        if renewed is None:
            return self.call.reported(entry) if isinstance(self.call, Telling) else entry
        if renewed.variant is None:
            return replace(entry, fallen_back=(*entry.fallen_back, *renewed.warnings))
        return renewed.variant.reported

    def _due(self) -> bool:
        session = self.session
        if session.trying or session.uneven or session.owned is not None:
            return False
        if not self.trains:
            self._calls += 1
            return self._calls > 1 and (self._calls - 1) % self.every == 0
        validation = session.validation
        if validation is None or not validation.due(session.steps):
            return False
        if validation.sampled == session.steps:  # a later micro-batch of the step
            return False
        validation.sampled = session.steps
        return True

    def _sample(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        step = self.session.steps + 1 if self.trains else self._calls
        found, wrong = None, None
        try:
            found = self.compare(model, args, kwargs)
        except MismatchError as error:
            wrong = error
        except Exception as error:  # memory, most often: the step itself needs less
            log.warning("step %d could not be compared with eager: %s", step, error)
            self.samples = replace(self.samples, failed=self.samples.failed + 1)
        wrong = self._of_all(wrong) if self.trains else wrong
        seconds = self.samples.seconds + time.perf_counter() - start
        if wrong is None:
            self._note(step, found, seconds)
            return
        kind = "step" if self.trains else "call"
        wrong.message = f"{wrong.message}, in {kind} {step}"
        wrong.args = (wrong.message,)
        self._renew(wrong, model, args, kwargs)

    def _renew(
        self,
        wrong: MismatchError | None,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.renewed = self.renew(wrong, model, args, kwargs)
        self.call, self._distrusted = self.renewed.call, len(self.session.distrusted)
        for text in self.renewed.warnings:
            warn(text)

    def _of_all(self, mine: MismatchError | None) -> MismatchError | None:
        """The first mismatch of any rank."""
        return of_all(self.session, TOPIC, mine)

    def _note(self, step: int, found: Verification | None, seconds: float) -> None:
        if found is None:
            return
        before = self.samples
        worse = found.worst_error > before.worst_error
        self.samples = replace(
            before,
            count=before.count + 1,
            step=step,
            first_error=found.worst_error if not before.count else before.first_error,
            last_error=found.worst_error,
            worst_name=found.worst_name if worse else before.worst_name,
            worst_error=max(found.worst_error, before.worst_error),
            worst_step=step if worse else before.worst_step,
            seconds=seconds,
        )


def of_all(session: Session, topic: str, mine: MismatchError | None) -> MismatchError | None:
    """The first mismatch that any rank has, told to all; who has none of its own is told whose.

    Args:
        session: of the model.
        topic: equal on all ranks, which all come.
        mine: this rank's.

    Raises:
        RankError: a rank did not come.
    """
    text = "" if mine is None else json.dumps([mine.guilty, mine.message, mine.where, mine.hint])
    rank, told = session.complaint(topic, text)
    if not told:
        return None
    guilty, message, where, hint = json.loads(told)
    job = session.in_job
    said = f"on rank {rank}, {message}" if job else message
    return MismatchError(said, where=where, hint=hint, guilty=guilty)
