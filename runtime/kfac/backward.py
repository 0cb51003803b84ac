"""The backward of a step whose gradients are preconditioned: with statistics, or without."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.plan import Plan, Role, Signature, Slot
from graphopt.runtime.accumulation import Accumulation
from graphopt.runtime.engine.partition import Halves
from graphopt.runtime.group_gradients.forms import backward_slots, with_outputs
from graphopt.runtime.group_gradients.reduction import Backwards, Run
from graphopt.runtime.kfac.labels import tangents_of_labels
from graphopt.runtime.kfac.share import Share
from graphopt.runtime.kfac.state import CurvatureState
from graphopt.runtime.ranks.presence import Presence
from graphopt.runtime.ranks.workers import Workers

Make = Callable[[Halves, Plan, Callable[[fx.GraphModule], Run]], Backwards]


@dataclass
class _Call:
    """What a backward needs to know of its forward."""

    inner: Any
    ends_step: bool
    parameters: dict[str, Tensor]
    output: Tensor | None


class Preconditioning(Backwards):
    """Two backwards from one half: one computes the statistics, too.

    Args:
        halves: of the step; the backward has ``STATISTIC`` outputs behind all others.
        plan: what to obey.
        accumulation: which steps are micro-batches.
        share: the ranks that keep the blocks together.
        state: where the curvature is kept.
        make: gives the backward of a half, which may reduce gradients over ranks.
        compile: makes an executable of a half.
    """

    def __init__(
        self,
        halves: Halves,
        plan: Plan,
        accumulation: Accumulation,
        share: Share,
        state: dict[str, Tensor],
        make: Make,
        compile: Callable[[fx.GraphModule], Run],
    ) -> None:
        assert plan.curvature is not None
        self.halves, self.plan = halves, plan
        self.accumulation, self.share = accumulation, share
        self.curvature = CurvatureState(plan.curvature, state)
        self.slots = [s for s in plan.signature.inputs if s.role is not Role.TANGENT]
        self._make, self._compile = make, compile
        self._caught: list[Tensor] = []
        self._forms: dict[str, Backwards] = {}
        self._only_statistics: Run | None = None
        returned = [s for s in backward_slots(plan.signature) if s.role is not Role.LOCAL]
        self._statistics = [s.name for s in returned if s.role is Role.STATISTIC]
        parameters = set(plan.signature.names(Role.PARAM))
        self._gradients = {
            s.name: i
            for i, s in enumerate(returned)
            if s.role is Role.GRAD and s.name in parameters
        }
        self._workers: Workers | None = None
        if plan.grouping is None and isinstance(accumulation, Workers):
            self._workers = accumulation
            self._presence = Presence(plan, returned)
        # The reducing backward scales tangents alike in both forms.
        self._plain = self._form("plain")

    def forward_made(self, values: Sequence[Tensor], outputs: Sequence[Tensor]) -> _Call:
        """Note whether this step is a micro-batch, and what labels would be sampled from."""
        assert self.plan.curvature is not None
        named = zip(self.slots, values, strict=True)
        parameters = {s.name: v for s, v in named if s.role is Role.PARAM}
        samples = self.plan.curvature.fisher != "empirical"
        return _Call(
            self._plain.forward_made(values, outputs),
            self.accumulation.synchronise,
            parameters,
            outputs[0].detach() if samples and outputs else None,
        )

    def tangent_factor(self, call: _Call) -> float:
        """That of the backward inside."""
        return self._plain.tangent_factor(call.inner)

    def __call__(self, arguments: list[Any], call: _Call, absent: Collection[int]) -> list[Any]:
        """Run the form that is due, and precondition what it returns at the end of a step."""
        due = self.curvature.due()
        statistics: dict[str, Tensor] = {}
        if due and call.output is not None:
            statistics = self._of_labels(arguments, call.output)
            results = self._plain(arguments, call.inner, absent)
        elif due:
            results = self._form("statistics")(arguments, call.inner, absent)
            statistics = dict(zip(self._statistics, self._caught, strict=True))
            self._caught = []
        else:
            results = self._plain(arguments, call.inner, absent)
        scale = 1.0
        if call.output is None:
            # A backward that reduces has tangents that already take the mean over ranks.
            scale = self.accumulation.loss_scale * self.tangent_factor(call)
        self.curvature.absorb(statistics, scale)
        if call.ends_step:
            self._end(results, call, due)
        return results

    def _end(self, results: list[Any], call: _Call, due: set[str]) -> None:
        gradients = self._of_step(results, call)
        samples = [name for block in self.curvature.curvature.blocks for name in block.samples]
        fresh = self.curvature.taken([*due, *samples] if due else ())
        gradients.update(self.share.step(self.curvature, gradients, fresh))
        self.curvature.advance()
        for name, value in gradients.items():
            results[self._gradients[name]] = value

    def _of_step(self, results: Sequence[Any], call: _Call) -> dict[str, Tensor]:
        """Gradients of parameters over all micro-batches; zeros where only other ranks have one."""
        found: dict[str, Tensor] = {}
        accumulates = self.plan.grouping is None and self.curvature.micro_batches > 1
        for name, index in self._gradients.items():
            parameter, gradient = call.parameters[name], results[index]
            if accumulates and parameter.grad is not None:
                gradient = parameter.grad if gradient is None else gradient + parameter.grad
                parameter.grad = None
            if gradient is not None:
                found[name] = gradient
        if self._workers is None:
            return found
        lacking = {i for name, i in self._gradients.items() if name not in found}
        question = self._presence.ask(self._workers.line, lacking, (), self._workers.device)
        nowhere = self._presence.absent(lacking, question)
        return {
            name: found[name] if name in found else torch.zeros_like(call.parameters[name])
            for name, index in self._gradients.items()
            if index not in nowhere
        }

    def _form(self, name: str) -> Backwards:
        if name not in self._forms:
            slots = backward_slots(self.plan.signature)
            halves, plan, compile = self.halves, self.plan, self._compile
            if name == "plain":
                kept = [s.role is not Role.STATISTIC for s in slots]
                halves = replace(halves, backward=with_outputs(halves.backward, kept))
                outputs = tuple(s for s in plan.signature.outputs if s.role is not Role.STATISTIC)
                plan = replace(plan, signature=Signature(plan.signature.inputs, outputs))
            else:
                compile = self._catching
            self._forms[name] = self._make(halves, plan, compile)
        return self._forms[name]

    def _catching(self, half: fx.GraphModule) -> Run:
        """An executable that returns all results but the last, the statistics, which are kept."""
        run = self._compile(half)
        count = len(self._statistics)

        def first(arguments: list[Any]) -> Sequence[Any]:
            results = run(arguments)
            self._caught = list(results[len(results) - count :])
            return results[: len(results) - count]

        return first

    def _of_labels(self, arguments: Sequence[Any], output: Tensor) -> dict[str, Tensor]:
        """Statistics of gradients for other labels than the given ones, averaged or summed."""
        assert self.plan.curvature is not None
        if self._only_statistics is None:
            slots = backward_slots(self.plan.signature)
            kept = [s.role is Role.STATISTIC for s in slots]
            self._only_statistics = self._compile(with_outputs(self.halves.backward, kept))
        first = [s for s in self.plan.signature.inputs if s.role is Role.TANGENT]
        labelled = _position(first)
        total: dict[str, Tensor] = {}
        for tangent in tangents_of_labels(self.plan.curvature, output):
            given = list(arguments)
            for at, (kind, index) in enumerate(self.halves.sources):
                if kind == "tangent":
                    given[at] = (
                        tangent.expand_as(given[at]).contiguous()
                        if index == labelled
                        else given[at].new_zeros(given[at].shape)
                    )
            self._add(total, self._only_statistics(given))
        return total

    def _add(self, total: dict[str, Tensor], found: Sequence[Any]) -> None:
        """Moments of output gradients add up over labels; those of inputs do not depend on them."""
        for name, value in zip(self._statistics, found, strict=True):
            if name not in total:
                total[name] = value
            elif self.curvature.is_of_gradients(name):
                total[name] = total[name] + value


def _position(tangents: Sequence[Slot]) -> int:
    """Which tangent belongs to the model's first output."""
    return next(i for i, slot in enumerate(tangents) if slot.name == "0")
