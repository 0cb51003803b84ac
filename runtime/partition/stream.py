"""Pipelined backpropagation: a pipeline that is never drained (Kosson et al., arXiv 2003.11666).

In each time step a stage does the forward of a new micro-batch and the backward of one that came
``2 (S - 1 - s)`` before, and renews its weights. What it does depends on counters alone, so that
results are the same in every run although nothing is synchronised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import ArgumentError
from graphopt.plan import Phase
from graphopt.runtime.engine.step import Step
from graphopt.runtime.partition.compared_stream import ComparedStream
from graphopt.runtime.partition.engine import PipelineEngine
from graphopt.runtime.partition.update import Gathered, gradients_of
from graphopt.runtime.partition.work import Task, Work
from graphopt.schedules.laws import concurrent_delay

Finish = Callable[[PipelineEngine, Step, dict[str, Tensor]], None]

STASH, INCONSISTENT, PREDICTED = "stash", "inconsistent", "predicted"


class Stream:
    """The micro-batches in flight in one stage, and its updates.

    Args:
        work: does them.
        stage: of this rank.
        stages: how many there are.
        weights: which a backward sees: those of its forward (``"stash"``), the current ones
            (``"inconsistent"``), or the current ones after a forward with predicted ones.
        every: micro-batches per update.
        finish: what follows a backward.

    Attributes:
        number: of the next micro-batch, counted from an empty pipeline.
        compared: compares some updates with the whole graph.
    """

    def __init__(
        self, work: Work, stage: int, stages: int, weights: str, every: int, finish: Finish
    ) -> None:
        self.work, self.stage, self.weights, self.every = work, stage, weights, every
        self.behind = concurrent_delay(stages, stage)
        self.delay = -(-self.behind // every)  # in updates
        self._last = stage == stages - 1
        self._finish = finish
        self._flying: deque[Task] = deque()
        self._gathered = Gathered()
        self._examples = 0
        self._nominal = 0
        # A micro-batch that may turn out to be the last of an update, as a drain is not foreseen.
        self._held: tuple[PipelineEngine, Step] | None = None
        self._update = 0
        self.compared: ComparedStream | None = None
        self.number = 0

    def check(self, optimizer: Optimizer | None) -> None:
        """Refuse an optimizer with which weights would be wrong, and tell it how late it is.

        Raises:
            ArgumentError: there is none, it is fused, or it predicts nothing.
        """
        if optimizer is None:
            raise ArgumentError(
                "a pipeline that is never drained renews weights within a step, and has no "
                "optimizer",
                where="optimizer",
                hint="optimize(..., optimizer=torch.optim.SGD(model.parameters(), lr=0.1))",
            )
        if any(group.get("fused") for group in optimizer.param_groups):
            raise ArgumentError(
                "a fused optimizer hides that it changes weights which backwards in flight still "
                "read",
                where="optimizer",
                hint="make it with fused=False",
            )
        if self.weights == PREDICTED and not hasattr(optimizer, "predict"):
            raise ArgumentError(
                "weights=predicted needs an optimizer that predicts, and "
                f"{type(optimizer).__name__} does not",
                where="optimizer",
                hint="graphopt.optim.DelayedSGD(model.parameters(), prediction='velocity')",
            )
        if hasattr(optimizer, "rebind"):
            optimizer.rebind = self._stashes
        if hasattr(optimizer, "set_delay"):
            optimizer.set_delay(self.delay)

    @property
    def _stashes(self) -> bool:
        return self.weights == STASH and self.behind > 0

    def push(self, task: Task, optimizer: Optimizer, following: Task | None = None) -> list[Task]:
        """Do one time step with a new micro-batch; those whose backward was done in it.

        Args:
            task: the micro-batch.
            optimizer: of the model's parameters.
            following: the next micro-batch, if it is known, whose receive is posted now.
        """
        if not self._nominal:
            self._nominal = task.batch.examples
        # Micro-batches add up by their size; as a rule they have one.
        task.factor = task.batch.examples / self._nominal
        task.number, self.number = self.number, self.number + 1
        task.ends = self.number % self.every == 0
        if self.stage:
            self.work.ask(Phase.FORWARD, self.stage, task)
            if following is not None:
                following.number = self.number
                self.work.ask(Phase.FORWARD, self.stage, following)
        predicted = self._predicted(optimizer)
        if self.compared is not None and self.compared.remembers(task):
            self.compared.before()
            self.work.forward(self.stage, task, stash=self._stashes)
            self.compared.forward(self.stage, task, self._stashes)
        else:
            self.work.forward(self.stage, task, weights=predicted, stash=self._stashes)
        self._flying.append(task)
        if not self._last:
            self.work.ask(Phase.BACKWARD, self.stage, task)
        return [self._backward(optimizer)] if len(self._flying) > self.behind else []

    def drain(self, optimizer: Optimizer) -> list[Task]:
        """Finish all that is in flight, and update with what is left over."""
        done = []
        while self._flying:
            if len(self._flying) == 1:
                self._flying[0].flights[self.stage].step.ends = True
            done.append(self._backward(optimizer))
        if self._held is not None:  # the last stage has nothing in flight
            (engine, step), self._held = self._held, None
            step.ends = True
            self._end(engine, step, optimizer)
        number, nominal = self.number, self._nominal
        self.number = self._nominal = 0
        if self.compared is not None:
            self.compared.drained(number, nominal)
        return done

    @property
    def nominal(self) -> int:
        """Examples of a micro-batch, as a rule."""
        return self._nominal

    def _predicted(self, optimizer: Any) -> dict[str, Tensor] | None:
        if self.weights != PREDICTED:
            return None
        names: dict[Tensor, str] = {p: n for n, p in self.work.owned.model().named_parameters()}
        found: Mapping[Tensor, Tensor] = optimizer.predict()
        return {names[p]: value for p, value in found.items()}

    def _backward(self, optimizer: Optimizer) -> Task:
        task = self._flying.popleft()
        self._update = task.number // self.every
        if self._held is not None:
            (engine, step), self._held = self._held, None
            self._finish(engine, step, {})
        sums = self._gathered if self._gathered.count else None
        step, _, results = self.work.backward(self.stage, task, sums=sums)
        self._gathered.set(gradients_of(results, step.parameters))
        self._examples += task.batch.examples
        if step.ends:
            self._end(task.engine, step, optimizer)
        else:
            self._held = task.engine, step
        return task

    def _end(self, engine: PipelineEngine, step: Step, optimizer: Optimizer) -> None:
        """Update with the gradients that were gathered."""
        gradients = self._gathered.take()
        share = self._nominal / self._examples
        if share != 1.0:
            names = list(gradients)
            scaled = torch._foreach_mul([gradients[n] for n in names], share)
            gradients = dict(zip(names, scaled, strict=True))
        self._examples = 0
        if self.compared is not None:
            self.compared.updated(self._update, gradients)
        if self._stashes and not hasattr(optimizer, "rebind"):
            _rebind(self.work.owned.model(), gradients)
        self._finish(engine, step, gradients)


def _rebind(model: nn.Module, names: Mapping[str, Tensor]) -> None:
    """New memory for weights, so that an update in place leaves those in flight alone."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data = parameter.data.clone()
