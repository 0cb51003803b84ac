"""Which form of the backward runs, and what surrounds it when gradients are reduced.

`Backwards` is the plain case of one form. `Reducing` chooses between forms: a step within
``no_sync`` returns its own gradients; the next step that synchronises reduces the sum of all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphopt.plan import Plan, Role, Slot
from graphopt.runtime.engine.partition import Halves
from graphopt.runtime.group_gradients import exact
from graphopt.runtime.group_gradients.forms import (
    accumulating,
    backward_slots,
    reduce_in_place,
    reducing,
    silent,
)
from graphopt.runtime.ranks.channel import Channel, warn_nonfinite
from graphopt.runtime.ranks.presence import Presence

# Takes a list of arguments, empties it, returns the outputs.
Run = Callable[[list[Any]], Sequence[Any]]


class Synchronisation(Protocol):
    """Whether the steps that begin now will reduce; see `graphopt.runtime.ranks.workers`."""

    line: Channel
    device: torch.device
    synchronise: bool
    pending: bool
    kept: list[dict[str, Tensor]]
    kept_names: set[str]


class Backwards:
    """One backward, without communication."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def forward_made(self, values: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        """Called when a forward has run; what it returns is given to the backward."""

    def tangent_factor(self, call: Any) -> float:
        """What the incoming tangents are multiplied with."""
        return 1.0

    def input_factor(self, call: Any) -> float:
        """What gradients of inputs are multiplied with: nobody averages them."""
        return 1.0 / self.tangent_factor(call)

    def __call__(self, arguments: list[Any], call: Any, absent: Collection[int]) -> list[Any]:
        """Run; empties `arguments`.

        Args:
            arguments: inputs of the half.
            call: what `forward_made` gave.
            absent: positions of results that are gradients which no tangent reaches on this rank.

        Returns:
            The results, with ``None`` for gradients that are absent.
        """
        return _without(self.run(arguments), absent)


def _without(results: Sequence[Any], absent: Collection[int]) -> list[Any]:
    return [None if i in absent else r for i, r in enumerate(results)] if absent else list(results)


def backwards(
    halves: Halves,
    plan: Plan,
    workers: Synchronisation | None,
    compile: Callable[[fx.GraphModule], Run],
) -> Backwards:
    """The forms of the backward half that a plan's reductions ask for."""
    if plan.grouping is None:
        return Backwards(compile(halves.backward))
    assert workers is not None, "a plan that reduces gradients needs the ranks"
    slots = [s for s in plan.signature.inputs if s.role is not Role.TANGENT]
    return Reducing(halves.backward, plan, workers, compile, slots)


@dataclass
class _Call:
    """What a backward needs to know of its forward."""

    reduces: bool
    parameters: dict[str, Tensor]
    batch: int


@dataclass(eq=False)
class Reducing(Backwards):
    """The forms of a backward that reduces gradients over ranks.

    Args:
        half: the backward half, with ``LOCAL`` outputs.
        plan: what to obey.
        workers: the ranks.
        compile: makes an executable of a form; forms are made when they are first needed.
        slots: the inputs of the step, tangents not counted.
    """

    half: fx.GraphModule
    plan: Plan
    workers: Synchronisation
    compile: Callable[[fx.GraphModule], Run]
    slots: Sequence[Slot]
    _forms: dict[str, Run] = field(default_factory=dict)
    _accumulated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._presence = Presence(self.plan, self._returned())

    def forward_made(self, values: Sequence[Tensor], outputs: Sequence[Tensor]) -> _Call:
        """Note whether this step reduces: as with DDP the forward decides."""
        named = zip(self.slots, values, strict=True)
        parameters = {s.name: v for s, v in named if s.role is Role.PARAM}
        inputs = [
            v for s, v in zip(self.slots, values, strict=True) if s.role is Role.INPUT and v.dim()
        ]
        return _Call(self.workers.synchronise, parameters, inputs[0].shape[0] if inputs else 1)

    def tangent_factor(self, call: _Call) -> float:
        """The mean over ranks, where the backward is linear."""
        return self.plan.tangent_scale if call.reduces else 1.0

    def __call__(self, arguments: list[Any], call: _Call, absent: Collection[int]) -> list[Any]:
        """Run the form that the forward asked for."""
        if self.plan.wire == "int32" and not (call.reduces and not self.workers.kept):
            return self._exactly(arguments, call, absent)
        if not call.reduces:
            self.workers.pending = True
            return _without(self._form("silent")(arguments), absent)
        line = self.workers.line
        line.batch = call.batch
        line.begin(self.plan, call.parameters)
        before: set[str] = set()
        if self.workers.pending:
            run = self._form("accumulating")
            before = {n for n in self._accumulated if call.parameters[n].grad is not None}
            arguments.extend(self._take(call))
            self.workers.pending = False
        else:
            run = self._form("reducing")
        question = self._presence.ask(line, absent, before, self.workers.device)
        found = len(line.nonfinite)
        results = run(arguments)
        line.end()
        if len(line.nonfinite) > found:
            warn_nonfinite(line, self._not_finite(results))
        return _without(results, self._presence.absent(absent, question))

    def _exactly(self, arguments: list[Any], call: _Call, absent: Collection[int]) -> list[Any]:
        """Keep every micro-batch's gradients apart until they are reduced together."""
        results = list(self._form("silent")(arguments))
        names = {i: s.name for i, s in enumerate(self._returned()) if s.role is Role.GRAD}
        at = {name: i for i, name in names.items()}
        assert self.plan.grouping is not None
        grouped = [name for group in self.plan.grouping.groups for name in group.names]
        kept = self.workers.kept
        kept.append({name: results[at[name]] for name in grouped})
        kept_names = self.workers.kept_names
        kept_names.update(self._presence.present(absent))
        means: dict[str, Tensor] = {}
        if call.reduces:
            line = self.workers.line
            line.begin(self.plan, call.parameters)
            question = self._presence.ask(line, absent, kept_names, self.workers.device)
            means = exact.reduce(line, self.plan.grouping.groups, kept)
            absent = self._presence.absent(absent, question)
            kept.clear()
            kept_names.clear()
        for name in grouped:
            results[at[name]] = means.get(name)
        return _without(results, absent)

    def _returned(self) -> list[Slot]:
        unseen = (Role.LOCAL, Role.STATISTIC)
        return [s for s in backward_slots(self.plan.signature) if s.role not in unseen]

    def _form(self, name: str) -> Run:
        if name not in self._forms:
            slots = backward_slots(self.plan.signature)
            if name == "silent":
                module = silent(self.half, slots)
            elif name == "reducing":
                module = reduce_in_place(reducing(self.half, slots))
            else:
                scale = self.plan.tangent_scale
                module, self._accumulated = accumulating(self.half, slots, scale)
                reduce_in_place(module)
            self._forms[name] = self.compile(module)
        return self._forms[name]

    def _take(self, call: _Call) -> list[Tensor]:
        """The accumulated gradients; the parameters' own ones are replaced by the reduced sum."""
        taken = []
        for name in self._accumulated:
            parameter = call.parameters[name]
            gradient = parameter.grad
            taken.append(torch.zeros_like(parameter) if gradient is None else gradient)
            parameter.grad = None
        return taken

    def _not_finite(self, results: Sequence[Any]) -> list[str]:
        return [
            s.name
            for s, r in zip(self._returned(), results, strict=True)
            if s.role is Role.GRAD and r is not None and not torch.isfinite(r).all()
        ]
