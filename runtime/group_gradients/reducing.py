"""Which form of a backward that reduces gradients runs, and what surrounds it.

A step within ``no_sync`` returns its own gradients; the next step that ends reduces the sum of all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.plan import Plan, Role
from graphopt.plan.group_gradients import Reduction
from graphopt.runtime.engine.step import Backward, Half, MakeBackward, Step
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
        self._forms: dict[str, Backward] = {}
        self._stamps: dict[str, Stamp | None] = {}
        self._names = tuple(s.name for s in half.slots if s.role is Role.LOCAL)
        self._presence = Presence(plan, self._names)
        parameters = set(plan.signature.names(Role.PARAM))
        gradients = [(i, s.name) for i, s in enumerate(self.returns) if s.role is Role.GRAD]
        self._positions = {name: i for i, name in gradients}
        # Nobody averages gradients of inputs, so the scale of the tangents comes off again.
        self._of_inputs = [i for i, name in gradients if name not in parameters]
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
        present = (set(self._names) - set(absent)) | (before or set())
        question = None
        if self.part.stale == "none":
            # A result of the step before belongs to no tangent of this one: it is never absent.
            question = self._presence.ask(messages.ranks, present, messages.waiting)
        messages.asked = 0 if question is None else len(self._presence.names)
        found = len(messages.nonfinite)
        # The others reduce what is absent here, too, so it has to be computed.
        results = backward(step, tangents, set(absent) - set(self._names))
        messages.end()
        if scale != 1.0:
            for i in self._of_inputs:
                results[i] = None if results[i] is None else results[i] * (1.0 / scale)
        if not messages.shows_nonfinite and self._on_cpu(results):
            messages.results(self._not_finite(results))
        if len(messages.nonfinite) > found and not expected:
            messages.warn_nonfinite(self._not_finite(results))
        for name in self._presence.absent(absent, question):
            results[self._positions[name]] = None
        return results

    def _take(self, step: Step) -> set[str]:
        """Hand accumulated gradients to the form that adds them; their names."""
        taken = self.session.take(step.parameters, self._names)
        for name in self._names:
            own = taken.get(name)
            step.own[_key(name)] = torch.zeros_like(step.parameters[name]) if own is None else own
        return set(taken)

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
            self._forms[name] = self._below(half)
        return self._forms[name]

    def _on_cpu(self, results: Sequence[Any]) -> bool:
        """Where looking at a gradient stops nothing."""
        found = (results[i] for i in self._positions.values())
        return all(r is None or r.device.type == "cpu" for r in found)

    def _not_finite(self, results: Sequence[Any]) -> list[str]:
        found = ((name, results[i]) for name, i in self._positions.items())
        return [name for name, r in found if r is not None and not torch.isfinite(r).all()]


def _key(name: str) -> str:
    return f"group_gradients/accumulated/{name}"
