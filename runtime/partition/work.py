"""One rank of a pipeline: forwards and backwards of its stages, and their messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graphopt.errors import ArgumentError
from graphopt.plan import Phase, Role, Slot
from graphopt.runtime.engine.counted import Counted
from graphopt.runtime.engine.step import Step
from graphopt.runtime.owned_step import Called, OwnedStep
from graphopt.runtime.partition.batch import MicroBatch
from graphopt.runtime.partition.engine import PipelineEngine, Visit
from graphopt.runtime.partition.forms import Forms, Sizes
from graphopt.runtime.partition.loss import loss_of, tangents_of
from graphopt.runtime.partition.messages import Arriving, Form, Messages
from graphopt.runtime.partition.reference import stream_of
from graphopt.runtime.partition.stage import InFlight, Stage
from graphopt.runtime.partition.update import Gathered
from graphopt.runtime.session import Session

LOSS = Form((), (), torch.float32)

# Of so many shapes of calls the sizes are kept.
_KEPT = 256


@dataclass(eq=False)
class Task:
    """One micro-batch on its way through the stages of this rank.

    Attributes:
        number: of the micro-batch, for messages and errors.
        batch: its part of the batch.
        kind: the captured kind of its call.
        engine: of that kind.
        forms: of its tensors.
        factor: of its loss, in the gradients that add up.
        ends: whether it is the last of a step.
        loss: of the last stage, or what came back with the gradients.
    """

    number: int
    batch: MicroBatch
    kind: Called
    engine: PipelineEngine
    forms: Forms
    factor: float = 1.0
    ends: bool = False
    loss: Tensor | None = None
    flights: dict[int, InFlight] = field(default_factory=dict)
    tangents: Mapping[str, Any] = field(default_factory=dict)
    received: dict[int, list[Tensor]] = field(default_factory=dict)


class Work:
    """What this rank does for its stages.

    Args:
        session: of the model.
        owned: the model and its loss.
        messages: to and from other ranks.

    Attributes:
        visit: what the engine of the model does when it is called now.
        streams: where random numbers began, by stage and micro-batch, of a step that is compared;
            ``None`` in other steps.
    """

    def __init__(self, session: Session, owned: OwnedStep, messages: Messages) -> None:
        self.session = session
        self.owned = owned
        self.messages = messages
        self.visit: Visit | None = None
        self.streams: dict[tuple[int, int], Tensor] | None = None
        self._sizes: dict[tuple[PipelineEngine, tuple[torch.Size, ...]], Sizes] = {}
        self._asked: dict[tuple[Phase, int, int], Arriving] = {}

    def task(self, number: int, batch: MicroBatch) -> Task:
        """A micro-batch to work on; its kind of call is captured where it is new.

        Raises:
            ArgumentError: calls of this kind have no stages.
        """
        kind = self.owned.kind_of(batch.args, batch.kwargs)
        engine = engine_of(kind)
        return Task(number, batch, kind, engine, self._forms(batch, kind, engine))

    def _forms(self, batch: MicroBatch, kind: Called, engine: PipelineEngine) -> Forms:
        """The forms of a call, whose sizes its flat inputs say."""
        if not engine.forms.vary:
            return engine.forms.at(())
        leaves = tree_leaves((batch.args, batch.kwargs))
        key = engine, tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))
        if key not in self._sizes:
            if len(self._sizes) >= _KEPT:
                self._sizes.clear()

            def visit(_: PipelineEngine, values: list[Tensor]) -> Sequence[Any]:
                self._sizes[key] = sizes = engine.forms.sizes(values)
                return engine.placeholders(sizes)

            self.visit = visit
            try:
                with self.owned.untouched(batch.args, batch.kwargs):
                    kind.call(self.owned.model(), *batch.args, **batch.kwargs)
            finally:
                self.visit = None
        return engine.forms.at(self._sizes[key])

    # -- messages ----------------------------------------------------------------------------------

    def ask(self, phase: Phase, stage: int, task: Task) -> None:
        """Post the receive of what a stage needs of a micro-batch, unless that was done."""
        key = (phase, stage, task.number)
        if key in self._asked:
            return
        forward = phase is Phase.FORWARD
        other = stage - 1 if forward else stage + 1
        forms = task.forms.forward if forward else task.forms.backward
        names, laid = forms[stage - 1 if forward else stage]
        if not forward:
            names, laid = ("", *names), (LOSS, *laid)
        what = _words(phase, stage, other, task.number)
        rank = task.engine.part.stages[other].rank
        self._asked[key] = self.messages.ask(phase, names, laid, rank, what)

    def _take(self, phase: Phase, stage: int, task: Task) -> dict[str, Tensor]:
        self.ask(phase, stage, task)
        message = self._asked.pop((phase, stage, task.number))
        values = self.messages.arrived(message)
        task.received.setdefault(stage, []).extend(message.values)
        return values

    def _send(self, phase: Phase, stage: int, task: Task, values: Mapping[str, Any]) -> None:
        forward = phase is Phase.FORWARD
        other = stage + 1 if forward else stage - 1
        forms = task.forms.forward if forward else task.forms.backward
        names, laid = forms[stage if forward else stage - 1]
        given = [(form, values[name]) for name, form in zip(names, laid, strict=True)]
        if not forward:
            assert task.loss is not None
            given.insert(0, (LOSS, task.loss))
        rank = task.engine.part.stages[other].rank
        self.messages.send(phase, given, rank, _words(phase, other, stage, task.number))

    # -- computation -------------------------------------------------------------------------------

    def forward(
        self,
        stage: int,
        task: Task,
        *,
        weights: Mapping[str, Tensor] | None = None,
        stash: bool = False,
    ) -> None:
        """The forward of a micro-batch in a stage of this rank, with its messages.

        Args:
            stage: which one.
            task: the micro-batch.
            weights: parameters by name that take the place of the model's own.
            stash: whether the backward reads what the parameters are now.
        """
        engine, last = task.engine, len(task.engine.part.stages) - 1
        received = self._take(Phase.FORWARD, stage, task) if stage else {}
        flight = task.flights[stage] = InFlight(Step())
        sent: dict[str, Any] = {}
        leaves: dict[str, Tensor] = {}

        def visit(found: PipelineEngine, values: list[Tensor]) -> Sequence[Any]:
            assert found is engine
            flight.step = _step(engine, values, task)
            if stash:
                flight.step.weights = {n: p.detach() for n, p in flight.step.parameters.items()}
            given = values if weights is None else _replaced(engine, values, weights)
            if self.streams is not None:
                self.streams[stage, task.number] = stream_of(self.messages.ranks.device)
            sent.update(engine.stage(stage).forward(flight, given, received))
            if given is not values:
                flight.step.inputs = {i: values[i] for i in flight.step.inputs}
            if stage < last:
                return engine.placeholders(engine.forms.sizes(values))
            leaves.update(leaves_of(engine, flight.outputs))
            return list(leaves.values())

        self.visit = visit
        try:
            with torch.enable_grad():
                output = task.kind.call(self.owned.model(), *task.batch.args, **task.batch.kwargs)
                if stage == last:
                    loss = loss_of(self.owned.loss, output, task.batch.target)
                    task.tangents = tangents_of(loss, leaves, task.factor)
                    task.loss = loss.detach().to(torch.float32).reshape(())
        finally:
            self.visit = None
        flight.outputs = {}
        if stage < last:
            self._send(Phase.FORWARD, stage, task, sent)

    def backward(
        self, stage: int, task: Task, part: int = 0, sums: Gathered | None = None
    ) -> tuple[Step, dict[str, Any], dict[Slot, Any]]:
        """The backward of a micro-batch in a stage of this rank, or one of its parts.

        Returns:
            Its step, shares of gradients that several stages add up, and results by slot.
        """
        runner: Stage = task.engine.stage(stage)
        flight = task.flights[stage]
        received: dict[str, Any] = {}
        if stage < len(task.engine.part.stages) - 1 and part == 0:
            received = self._take(Phase.BACKWARD, stage, task)
            # Its memory is used again, so the number is copied.
            task.loss = received.pop("").clone()
        sent, partials, results = runner.backward(flight, task.tangents, received, part, sums)
        if part == 0:
            flight.sent = sent
            if stage:
                self._send(Phase.BACKWARD, stage, task, sent)
        if part == len(runner.backward_ports) - 1:
            del task.flights[stage]
            self._give_back(task.received.pop(stage, []), results, partials, flight.sent)
        return flight.step, partials, results

    def _give_back(self, values: Sequence[Tensor], *kept: Mapping[Any, Any]) -> None:
        """Reuse received memory, except where something that lives on lies in it."""
        held = {
            v.untyped_storage().data_ptr()
            for some in kept
            for v in some.values()
            if isinstance(v, Tensor)
        }
        self.messages.release([v for v in values if v.untyped_storage().data_ptr() not in held])


def engine_of(kind: Called) -> PipelineEngine:
    """The engine of a kind of call.

    Raises:
        ArgumentError: it is not in stages.
    """
    engine: Any = kind.engine
    while isinstance(engine, Counted):
        engine = engine.inner
    if not isinstance(engine, PipelineEngine):
        raise ArgumentError(
            "this call has no backward that could be cut into stages",
            where="step",
            hint="let parameters require gradients, and ask for at least two stages",
        )
    return engine


def _step(engine: PipelineEngine, values: Sequence[Tensor], task: Task) -> Step:
    slots = enumerate(engine.slots)
    parameters = {s.name: values[i] for i, s in slots if s.role is Role.PARAM}
    return Step(parameters=parameters, examples=task.batch.examples, ends=task.ends)


def _replaced(
    engine: PipelineEngine, values: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> list[Tensor]:
    return [
        weights.get(s.name, v) if s.role is Role.PARAM else v
        for s, v in zip(engine.slots, values, strict=True)
    ]


def leaves_of(engine: PipelineEngine, outputs: Mapping[Slot, Any]) -> dict[str, Tensor]:
    """Outputs by name, such that the loss can be differentiated with regard to them."""
    tangents = set(engine.plan.signature.names(Role.TANGENT))
    found = {}
    for slot, value in outputs.items():
        if slot.role is Role.OUTPUT:
            leaf = value.detach() if isinstance(value, Tensor) else value
            found[slot.name] = leaf.requires_grad_() if slot.name in tangents else leaf
    return found


def _words(phase: Phase, stage: int, other: int, number: int) -> str:
    what = "activations" if phase is Phase.FORWARD else "gradients"
    return f"the {what} of micro-batch {number} from stage {other} to stage {stage}"
