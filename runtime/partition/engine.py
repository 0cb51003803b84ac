"""The engine of a step in stages: whole where the model is called, one stage at a time in a step.

In a step this rank calls the model once for each of its stages and micro-batches. Whatever Python
surrounds the graph is the same as ever; where another rank's stage computes an output, one of its
form is returned, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import ArgumentError
from graphopt.partitioning.place import Placement
from graphopt.partitioning.split import Half, Kind, in_two, split
from graphopt.plan import Plan, Role
from graphopt.plan.partition import Stages
from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.engine.base import Engine
from graphopt.runtime.engine.step import Compile
from graphopt.runtime.partition.forms import Sized, Sizes
from graphopt.runtime.partition.stage import Stage
from graphopt.runtime.session import Session

Visit = Callable[["PipelineEngine", list[Tensor]], Sequence[Any]]


class PipelineEngine(Engine):
    """One kind of call, whole and in stages.

    Args:
        module: its graph.
        plan: what to obey.
        session: of the model.
        part: the stages.
        whole: runs the graph in one process.
        compile: makes a function of a graph.
        visit: gives what a step does with a call, if there is a step.

    Attributes:
        module: its graph, as it was given.
        forms: of outputs, and of what crosses the cuts.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plan: Plan,
        session: Session,
        part: Stages,
        whole: Callable[..., Any],
        compile: Compile,
        visit: Callable[[], Visit | None],
    ) -> None:
        super().__init__(
            plan, session, [s for s in plan.signature.outputs if s.role is Role.OUTPUT]
        )
        self.module, self.part, self.whole = module, part, whole
        self._visit, self._compile = visit, compile
        placement = Placement(len(part.stages), part.stage_of, part.sums)
        self._split = split(module, plan.signature, placement)
        self._two = part.schedule == "zero_bubble"
        self._stages: dict[int, Stage] = {}
        self.forms = Sized(module, plan, part, self._split)

    @property
    def sums(self) -> Half | None:
        """Adds up gradients from several stages."""
        return self._split.sums

    @cached_property
    def spread(self) -> tuple[str, ...]:
        """Parameters that a rank reads which does not compute their gradient, in order."""
        outputs, ranks = self.plan.signature.outputs, [s.rank for s in self.part.stages]
        given = {
            (outputs[port.position].name, rank)
            for half, rank in zip(self._split.backward, ranks, strict=True)
            for port in half.outputs
            if port.kind is Kind.STEP and outputs[port.position].role is Role.GRAD
        }
        once = {name for name, _ in given}
        return tuple(
            dict.fromkeys(
                name
                for stage in self.part.stages
                for name in stage.parameters
                if name in once and (name, stage.rank) not in given
            )
        )

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Outputs of the model for its flat inputs."""
        visit = self._visit()
        if visit is not None:
            return self._assemble(list(inputs), visit(self, self._with_state(inputs)))
        if torch.is_grad_enabled() and not self.session.trying and self._spread:
            raise ArgumentError(
                "the model was called to train, and its stages are on several ranks",
                hint="call model.step(*batch); without gradients the model may be called as usual",
            )
        found: Sequence[Any] = self.whole(inputs)
        return found

    @property
    def _spread(self) -> bool:
        ranks = self.session.ranks.get("pp")
        return ranks is not None and ranks.size > 1

    def stage(self, number: int) -> Stage:
        """One of this rank's stages, made when it is first needed."""
        if number not in self._stages:
            self._stages[number] = self._made(number, self._compile)
        return self._stages[number]

    def stage_by_eager(self, number: int) -> Stage:
        """Any of the stages, by eager's kernels, to tell a backend from the stages."""
        return self._made(number, boxed)

    def _made(self, number: int, compile: Compile) -> Stage:
        backward = self._split.backward[number]
        halves = in_two(backward) if self._two else (backward,)
        return Stage(self.plan, self.session, compile, self._split.forward[number], halves)

    def placeholders(self, sizes: Sizes) -> list[Tensor]:
        """Outputs of a call of these sizes, without values."""
        outputs = self.forms.at(sizes).outputs.values()
        return [v.new_zeros(()).expand(v.shape) for v in outputs]

    def made_up(self, sizes: Sizes, generator: torch.Generator) -> list[Tensor]:
        """Outputs of a call of these sizes with random values between 0 and 1; of integers, zeros.

        As those of a step they require gradients.
        """
        tangents = set(self.plan.signature.names(Role.TANGENT))
        found = []
        for name, value in self.forms.at(sizes).outputs.items():
            made = torch.rand(tuple(value.shape), generator=generator, dtype=torch.float32)
            made = made if value.is_floating_point() else made.mul(0)
            made = made.to(dtype=value.dtype, device=value.device)
            found.append(made.requires_grad_(name in tangents))
        return found
