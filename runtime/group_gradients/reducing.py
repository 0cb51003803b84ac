"""Which form of a backward that reduces gradients runs, and what surrounds it.

A step within ``no_sync`` returns its own gradients; the next step that ends reduces the sum of all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphopt.plan import Plan, Role
from graphopt.plan.group_gradients import Reduction
from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.engine.plain import PlainBackward
from graphopt.runtime.engine.step import Backward, Half, MakeBackward, Step
from graphopt.runtime.group_gradients.checked import Checked
from graphopt.runtime.group_gradients.forms import accumulating, reduce_in_place, reducing, silent
from graphopt.runtime.group_gradients.messages import Messages
from graphopt.runtime.group_gradients.stamp import KEY, Stamp, stamped
from graphopt.runtime.ranks.presence import Presence
from graphopt.runtime.session import Session

# Under which this batch's own gradients wait for `exact` within a step.
LOCAL = "group_gradients/local"


class Reducing:
    """The forms of a backward that reduces gradients over ranks.

    Args:
        session: of the model.
        messages: carries what the graph sends.
        part: what to obey.
        plan: of the step.
        half: the backward half, with ``LOCAL`` outputs.
        below: makes the backward of a form.
    """

    def __init__(
        self,
        session: Session,
        messages: Messages,
        part: Reduction,
        plan: Plan,
        half: Half,
        below: MakeBackward,
    ) -> None:
        self.session, self.messages, self.part = session, messages, part
        self.returns = tuple(s for s in half.slots if s.role is not Role.LOCAL)
        self._half, self._below = half, below
        self._checked = Checked(session, messages, part, plan.backend)
        self._inputs = tuple(s for s in plan.signature.inputs if s.role is not Role.TANGENT)
        self._forms: dict[str, Backward] = {}
        self._halves: dict[str, Half] = {}
        self._stamps: dict[str, Stamp | None] = {}
        self._names = tuple(s.name for s in half.slots if s.role is Role.LOCAL)
        self._presence = Presence(plan, self._names)
        parameters = set(plan.signature.names(Role.PARAM))
        gradients = [(i, s.name) for i, s in enumerate(self.returns) if s.role is Role.GRAD]
        self._positions = {name: i for i, name in gradients}
        # Nobody averages gradients of inputs, so the scale of the tangents comes off again.
        self._of_inputs = [i for i, name in gradients if name not in parameters]
        others = {s.name.partition("/")[0] for s in half.slots if s.role is Role.AUX}
        self._beside = f", with results for {', '.join(sorted(others))}" if others else ""
        if session.validation is not None:
            integers = "several micro-batches by integers"
            for name in ("reducing", integers if part.wire == "int32" else "accumulating"):
                beside = "" if name == integers else self._beside
                session.validation.expect(part.name, f"{name}{beside}")
        # What a backend asks of sizes is a condition of the graph while that is built, not later.
        if plan.signature.names(Role.SIZE):
            for name in ("silent", "reducing", "accumulating"):
                self._form(name)

    def __call__(
        self, step: Step, tangents: Sequence[Tensor | None], absent: Collection[str]
    ) -> list[Any]:
        """Run the form that the forward asked for."""
        if not self.session.trying:
            self.messages.passes += 1
        if self.part.wire == "int32" and (not step.ends or self.session.pending):
            # Every micro-batch stays apart until the last one is there.
            results = self._form("silent")(step, tangents, absent)
            local = {name: results[self._positions[name]] for name in self._names}
            step.own[LOCAL] = local, self._presence
            return results
        if not step.ends:
            if not self.session.trying:
                self.messages.waiting_examples += step.examples
            return self._form("silent")(step, tangents, absent)
        before = self._take(step) if self.session.pending else None
        form = "reducing" if before is None else "accumulating"
        name = form + self._beside
        checked, distrusts = self._checked, self._checked.distrusts(name)
        compares = not distrusts and (checked.wants(name) or self.messages.expects)
        again = _again(step, tangents) if compares or distrusts else None
        waited = {n: step.own[_key(n)] for n in self._names} if before is not None else {}
        scale = self.part.scale
        expected = step.scale != 1.0  # who scales tangents lets them overflow, and skips the step
        whole = self.session.loss_scale_of(step)
        if scale != 1.0:
            tangents = [None if t is None else t * scale for t in tangents]
            step.scale *= scale
        messages = self.messages
        backward = self._form(form)
        stamp = self._stamps[form]
        if messages.joining is not None:
            messages.joining.announce(self.part)
        messages.begin(self.part, step.parameters, step.examples, stamp, whole)
        if stamp is not None:
            step.own[KEY] = stamp.of(messages.number, messages.ranks.device)
        present = (set(self._names) - set(absent)) | set(before or ())
        question = None
        if self.part.stale == "none":
            # A result of the step before belongs to no tangent of this one: it is never absent.
            question = self._presence.ask(messages.ranks, present, messages.waiting)
        messages.asked = 0 if question is None else len(self._presence.names)
        found = len(messages.nonfinite)
        # The others reduce what is absent here, too, so it has to be computed.
        missing = set(absent) - set(self._names)
        if distrusts:
            assert again is not None
            results, local = self._alone(*again, missing, waited)
            self._put(results, checked.means(local))
            step.scale /= scale
            for n in self._names:
                step.own.pop(_key(n), None)
        else:
            results = backward(step, tangents, missing)
            messages.end()
        if scale != 1.0 and not distrusts:
            for i in self._of_inputs:
                results[i] = None if results[i] is None else results[i] * (1.0 / scale)
        if again is not None and not distrusts:
            try:
                self._compare(name, form, again, missing, waited, results)
            except BaseException:
                for n, gradient in (before or {}).items():
                    step.parameters[n].grad = gradient
                raise
        if not messages.shows_nonfinite and self._on_cpu(results):
            messages.results(self._not_finite(results))
        if len(messages.nonfinite) > found and not expected:
            messages.warn_nonfinite(self._not_finite(results))
        for name in self._presence.absent(absent, question):
            results[self._positions[name]] = None
        return results

    # -- comparing ---------------------------------------------------------------------------------

    def _alone(
        self,
        step: Step,
        tangents: Sequence[Tensor | None],
        absent: Collection[str],
        waited: Mapping[str, Tensor],
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Results of a backward that sends nothing; and its gradients with those accumulated."""
        results = self._form("silent")(step, tangents, absent)
        local = {n: results[self._positions[n]] for n in self._names}
        return results, {n: g + waited[n] if n in waited else g for n, g in local.items()}

    def _put(self, results: list[Any], gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            results[self._positions[name]] = gradient

    def _compare(
        self,
        name: str,
        form: str,
        again: tuple[Step, list[Tensor | None]],
        absent: Collection[str],
        waited: Mapping[str, Tensor],
        results: list[Any],
    ) -> None:
        """Compare what a form has reduced, and put what is right in the place of what is not."""
        step, tangents = again
        found = {n: results[self._positions[n]] for n in self._names}
        once_more = _again(step, tangents)
        with self.session.silently():
            _, local = self._alone(step, tangents, absent, waited)
        if self.part.stale == "none":

            def in_eager() -> Mapping[str, Tensor | None]:
                return self._in_eager(form, *once_more, absent, waited)

            instead = self._checked.check(name, local, found, in_eager)
        else:  # what this step returns was sent by the one before
            late = self.messages.take_expected()
            instead = None
            if late is not None:
                instead = self._checked.check(name, local, found, mean=late)
            if self._checked.wants(name):
                self.messages.expect(self._checked.expected(local))
        self._put(results, instead or {})

    def _in_eager(
        self,
        form: str,
        step: Step,
        tangents: Sequence[Tensor | None],
        absent: Collection[str],
        waited: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor | None]:
        """The gradients of a form, operator by operator, by eager's kernels; it sends once more."""
        messages, stamp = self.messages, self._stamps[form]
        scaled = [None if t is None else t * self.part.scale for t in tangents]
        step.own.update({_key(name): value for name, value in waited.items()})
        messages.step -= 1
        whole = self.session.loss_scale_of(step)
        messages.begin(self.part, step.parameters, step.examples, stamp, whole)
        if stamp is not None:
            step.own[KEY] = stamp.of(messages.number, messages.ranks.device)
        run = PlainBackward(boxed, self.session, self._inputs, self._halves[form])
        returns = [slot.name if slot.role is Role.GRAD else "" for slot in run.returns]
        return dict(zip(returns, run(step, scaled, absent), strict=True))

    # -- forms -------------------------------------------------------------------------------------

    def _take(self, step: Step) -> dict[str, Tensor]:
        """Hand accumulated gradients to the form that adds them; which there were."""
        taken = self.session.take(step.parameters, self._names)
        for name in self._names:
            own = taken.get(name)
            step.own[_key(name)] = torch.zeros_like(step.parameters[name]) if own is None else own
        return taken

    def _form(self, name: str) -> Backward:
        if name not in self._forms:
            half = self._half
            stamp = None
            if name == "silent":
                half = silent(half)
            else:
                accumulates = name == "accumulating"
                half = accumulating(half, self.part.scale, _key) if accumulates else reducing(half)
                if self.part.stale == "none":  # messages that wait get theirs when they are sent
                    half, stamp = stamped(half, self.messages.ranks)
                half = reduce_in_place(half)
            self._stamps[name] = stamp
            self._halves[name] = half
            self._forms[name] = self._below(half)
        return self._forms[name]

    def _on_cpu(self, results: Sequence[Any]) -> bool:
        """Where looking at a gradient stops nothing."""
        found = (results[i] for i in self._positions.values())
        return all(r is None or r.device.type == "cpu" for r in found)

    def _not_finite(self, results: Sequence[Any]) -> list[str]:
        found = ((name, results[i]) for name, i in self._positions.items())
        return [name for name, r in found if r is not None and not torch.isfinite(r).all()]


def _again(step: Step, tangents: Sequence[Tensor | None]) -> tuple[Step, list[Tensor | None]]:
    """What the same backward needs to run once more, alone."""
    again = replace(step, saved=list(step.saved), own=dict(step.own), ends=False)
    return again, list(tangents)


def _key(name: str) -> str:
    return f"group_gradients/accumulated/{name}"
