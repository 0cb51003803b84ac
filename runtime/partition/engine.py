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
from graphopt.plan import Plan, Role, Slot
from graphopt.plan.partition import Stages
from graphopt.runtime.engine.base import Engine
from graphopt.runtime.engine.step import Compile
from graphopt.runtime.partition.messages import Form
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
        forward_forms: what crosses each cut with the activations: names and forms.
        backward_forms: what comes back.
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
        self.part, self.whole = part, whole
        self._visit, self._compile = visit, compile
        placement = Placement(len(part.stages), part.stage_of, part.sums)
        self._split = split(module, plan.signature, placement)
        self._two = part.schedule == "zero_bubble"
        self._stages: dict[int, Stage] = {}
        self._forms = {s.name: _form(s, v) for s, v in _outputs(module, plan)}
        cuts = range(len(part.stages) - 1)
        self.forward_forms = [_crossing(self._split.forward[s], part, s, s + 1) for s in cuts]
        self.backward_forms = [_crossing(self._split.backward[s + 1], part, s + 1, s) for s in cuts]

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
            backward = self._split.backward[number]
            halves = in_two(backward) if self._two else (backward,)
            forward = self._split.forward[number]
            self._stages[number] = Stage(self.plan, self.session, self._compile, forward, halves)
        return self._stages[number]

    def placeholders(self) -> list[Tensor]:
        """Outputs of their forms, without values."""
        return [
            torch.zeros((), dtype=v.dtype, device=v.device).expand(v.shape)
            for v in self._forms.values()
        ]

    def made_up(self, generator: torch.Generator) -> list[Tensor]:
        """Outputs of their forms with random values between 0 and 1; of integers, zeros.

        As those of a step they require gradients.
        """
        tangents = set(self.plan.signature.names(Role.TANGENT))
        found = []
        for name, value in self._forms.items():
            made = torch.rand(tuple(value.shape), generator=generator, dtype=torch.float32)
            made = made if value.is_floating_point() else made.mul(0)
            made = made.to(dtype=value.dtype, device=value.device)
            found.append(made.requires_grad_(name in tangents))
        return found


def _outputs(module: fx.GraphModule, plan: Plan) -> list[tuple[Slot, Any]]:
    nodes: Any = module.graph.output_node().args[0]
    values = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in nodes)
    found = zip(plan.signature.outputs, values, strict=True)
    return [(slot, value) for slot, value in found if slot.role is Role.OUTPUT]


def _form(slot: Slot, value: Any) -> Tensor:
    """A recorded output of the model.

    Raises:
        ArgumentError: it is no tensor of known size.
    """
    if not isinstance(value, Tensor) or any(type(size) is not int for size in value.shape):
        raise ArgumentError(
            f"output {slot.name} of the model is a number or has a size that depends on data, "
            "which stages that do not compute it cannot know",
            where="forward",
            hint="return tensors of sizes that follow from those of the inputs",
        )
    return value


def _crossing(half: Half, part: Stages, made: int, read: int) -> tuple[list[str], list[Form]]:
    """Names and forms of what a half sends.

    Raises:
        ArgumentError: it is no tensor of known size.
    """
    returned: Any = half.module.graph.output_node().args[0]
    names, forms = [], []
    for port, node in zip(half.outputs, returned, strict=True):
        if port.kind is not Kind.SENT:
            continue
        value = node.meta["val"]
        if not isinstance(value, Tensor) or any(type(size) is not int for size in value.shape):
            raise ArgumentError(
                f"{port.name!r} goes from stage {made} to stage {read}, and its size depends on "
                "data",
                where=f"stage {made}: {', '.join(part.stages[made].modules)}",
                hint="ask for other stages=, or keep what has such sizes in one module",
            )
        names.append(port.name)
        forms.append(Form.of(value))
    return names, forms
