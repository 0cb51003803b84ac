"""Run the stages of a step in one process, in the order of any schedule.

It shows what a pipeline computes, without one: the reference for tests and studies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.partitioning.split import Half, Kind, Split, in_two
from graphopt.plan import Phase, Role, Slot
from graphopt.schedules import actions
from graphopt.schedules.actions import Action, Schedule
from graphopt.schedules.execution import refuse_stuck, split_backwards, waits_for
from graphopt.schedules.transfers import without_transfers

Tangents = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
Update = Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]]

_OWN = frozenset({Role.PARAM, Role.BUFFER, Role.STATE})


@dataclass
class Results:
    """What a run gave.

    Attributes:
        outputs: per micro-batch, everything but gradients of parameters, by slot.
        gradients: of parameters, added up over the micro-batches since the last update.
        values: parameters, buffers and states at the end.
        order: the actions as they were done.
    """

    outputs: list[dict[Slot, Tensor]]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    order: list[Action] = field(default_factory=list)


class Executor:
    """Runs micro-batches through the stages of a split step.

    Args:
        split: the stages.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    @cached_property
    def parts(self) -> tuple[tuple[Half, Half], ...]:
        """The backward half of each stage in two, for schedules that delay the second."""
        return tuple(in_two(half) for half in self.split.backward)

    @torch.no_grad()
    def run(
        self,
        schedule: Schedule,
        values: Mapping[str, Tensor],
        batches: Sequence[Mapping[str, Any]],
        tangents: Tangents,
        update: Update | None = None,
    ) -> Results:
        """Do all actions of a schedule.

        A backward reads the parameters that its forward has read, as long as nothing writes into
        them in place. Sends and receives of the schedule are left out: what a stage gives is there
        for its neighbour at once.

        Args:
            schedule: of as many stages and micro-batches.
            values: parameters, buffers and states by name.
            batches: plain inputs of each micro-batch by name.
            tangents: of the outputs of a micro-batch, from its number and its outputs, by name.
            update: new values of the parameters of a stage, from its number and its gradients since
                the last update. Without one, parameters stay as they are and gradients add up.

        Raises:
            ArgumentError: the schedule is for other numbers, or cannot run.
        """
        self._check(schedule, batches)
        if update is not None and self.split.sums is not None:
            shared = sorted(p.name for p in self.split.sums.outputs)
            raise ArgumentError(
                "a parameter in several stages cannot be updated by each of them alone",
                where=f"its gradient {shared[0]!r}",
                hint="choose stages that keep its operators together, or a schedule that flushes",
            )
        run = _Run(self, without_transfers(schedule), dict(values), batches, tangents, update)
        return run.finished()

    def _check(self, schedule: Schedule, batches: Sequence[object]) -> None:
        stages = len(self.split.forward)
        if (schedule.stages, schedule.micro_batches) != (stages, len(batches)):
            raise ArgumentError(
                f"the schedule has {schedule.stages} stages and {schedule.micro_batches} "
                f"micro-batches, and there are {stages} and {len(batches)}",
                where=f"schedule {schedule.name}",
                hint=f"generate({schedule.name!r}, {stages}, {len(batches)})",
            )


class _Run:
    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        values: dict[str, Tensor],
        batches: Sequence[Mapping[str, Any]],
        tangents: Tangents,
        update: Update | None,
    ) -> None:
        self.executor, self.schedule = executor, schedule
        self.slots = executor.split.signature.inputs
        self.given, self.batches = tangents, batches
        self.update = update
        self.results = Results([{} for _ in batches], values=values)
        # By stage and micro-batch; what is taken is taken away, as in a pipeline.
        self.sent: dict[tuple[int, int, Phase], dict[str, Any]] = {}
        self.saved: dict[tuple[int, int], dict[str, Any]] = {}
        self.kept: dict[tuple[int, int], dict[str, Any]] = {}
        self.weights: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.tangents: dict[int, Mapping[str, Tensor]] = {}
        self.own: list[dict[str, Tensor]] = [{} for _ in executor.split.forward]
        self.partials: dict[str, Tensor] = {}

    def finished(self) -> Results:
        """Go through the schedule."""
        lines = self.schedule.ranks
        split = split_backwards(self.schedule)
        place = [0] * len(lines)
        done: set[Action] = set()
        moved = True
        while moved:
            moved = False
            for rank, line in enumerate(lines):
                while place[rank] < len(line):
                    action = line[place[rank]]
                    if any(n not in done for n in waits_for(action, self.schedule, split)):
                        break
                    self._do(action)
                    done.add(action)
                    self.results.order.append(action)
                    place[rank] += 1
                    moved = True
        refuse_stuck([list(line[p:]) for line, p in zip(lines, place, strict=True)])
        for gradients in self.own:
            for name, gradient in gradients.items():
                _add(self.results.gradients, name, gradient)
        self._add_up()
        return self.results

    def _do(self, action: Action) -> None:
        stage, batch, split = action.stage, action.micro_batch, self.executor.split
        if action.kind is actions.Kind.UPDATE:
            self._renew(stage)
        elif action.kind is actions.Kind.F:
            self.weights[stage, batch] = dict(self.results.values)
            self._call(split.forward[stage], stage, batch, Phase.FORWARD)
            if stage == len(split.forward) - 1:
                outputs = self.results.outputs[batch]
                found = {s.name: t for s, t in outputs.items() if s.role is Role.OUTPUT}
                self.tangents[batch] = self.given(batch, found)
        else:
            halves = {
                actions.Kind.B: lambda: split.backward[stage],
                actions.Kind.I: lambda: self.executor.parts[stage][0],
                actions.Kind.W: lambda: self.executor.parts[stage][1],
            }
            self._call(halves[action.kind](), stage, batch, Phase.BACKWARD)
            if action.kind is not actions.Kind.I:
                for held in (self.saved, self.kept, self.weights):
                    held.pop((stage, batch), None)

    def _call(self, half: Half, stage: int, batch: int, phase: Phase) -> None:
        forward = phase is Phase.FORWARD
        neighbour = stage - 1 if forward else stage + 1
        sources: dict[Kind, Mapping[str, Any]] = {
            Kind.RECEIVED: self.sent.get((neighbour, batch, phase), {}),
            Kind.SAVED: self.saved.get((stage, batch), {}),
            Kind.KEPT: self.kept.get((stage, batch), {}),
        }
        arguments = [
            self._of_step(port.position, stage, batch)
            if port.kind is Kind.STEP
            else sources[port.kind][port.name]
            for port in half.inputs
        ]
        returned = half.module(*arguments)
        for port, value in zip(half.outputs, returned, strict=True):
            if port.kind is Kind.STEP:
                self._take(
                    self.executor.split.signature.outputs[port.position], value, stage, batch
                )
            elif port.kind is Kind.SENT:
                self.sent.setdefault((stage, batch, phase), {})[port.name] = value
            elif port.kind is Kind.SAVED:
                self.saved.setdefault((stage, batch), {})[port.name] = value
            elif port.kind is Kind.KEPT:
                self.kept.setdefault((stage, batch), {})[port.name] = value
            else:
                _add(self.partials, port.name, value)

    def _of_step(self, position: int, stage: int, batch: int) -> Any:
        slot = self.slots[position]
        if slot.role in _OWN:
            return self.weights[stage, batch][slot.name]
        if slot.role is Role.TANGENT:
            return self.tangents[batch][slot.name]
        return self.batches[batch][slot.name]

    def _take(self, slot: Slot, value: Any, stage: int, batch: int) -> None:
        if slot.role is Role.GRAD and slot.name in self.results.values:
            _add(self.own[stage], slot.name, value)
            return
        if slot.role is Role.MUTATION and slot.name in self.results.values:
            self.results.values[slot.name] = value
        self.results.outputs[batch][slot] = value

    def _renew(self, stage: int) -> None:
        if self.update is not None:
            self.results.values.update(self.update(stage, self.own[stage]))
            self.own[stage] = {}

    def _add_up(self) -> None:
        sums = self.executor.split.sums
        if sums is None or not self.partials:
            return
        returned = sums.module(*(self.partials[port.name] for port in sums.inputs))
        for port, value in zip(sums.outputs, returned, strict=True):
            slot = self.executor.split.signature.outputs[port.position]
            _add(self.results.gradients, slot.name, value)


def _add(into: dict[str, Tensor], name: str, value: Tensor) -> None:
    into[name] = into[name] + value if name in into else value
