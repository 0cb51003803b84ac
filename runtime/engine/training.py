"""Run a plan: forward and backward executables behind one autograd function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from graphopt.errors import DoubleBackwardError
from graphopt.plan import Phase, Plan, Role
from graphopt.runtime.engine.base import Engine, Executable, _returned
from graphopt.runtime.engine.partition import Halves
from graphopt.runtime.engine.tangents import Expected
from graphopt.runtime.group_gradients.reduction import Backwards


@dataclass(eq=False)
class TrainingEngine(Engine):
    """Runs a joint graph, split into halves, behind one autograd function.

    Args:
        plan: what to obey.
        halves: from `graphopt.runtime.engine.partition.split`; has the origin of its arguments.
        forward: executable of the forward half.
        backward: executables of the backward half: one, or several forms of it where gradients are
            reduced.
        state: tensors of ``STATE`` inputs.

    Attributes:
        weights_for_backward: tensors by parameter name that the backward reads instead of the ones
            the forward read; empty unless a schedule fills it.
    """

    plan: Plan
    halves: Halves
    forward: Executable
    backward: Backwards
    state: Mapping[str, Tensor] = field(default_factory=dict)
    weights_for_backward: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.plan, self.state)
        signature = self.plan.signature
        self.num_outputs = signature.num_forward_outputs
        tangents = [s for s in signature.inputs if s.role is Role.TANGENT]
        # Tangents belong to outputs of the model; the autograd function returns the computed ones.
        computed = [position for _, position in self._outputs]
        self.tangent_of_output = tuple(computed.index(int(t.name)) for t in tangents)
        placeholders = {
            n.target: n for n in self.halves.backward.graph.find_nodes(op="placeholder")
        }
        arguments = zip(self.halves.sources, placeholders.values(), strict=True)
        self.tangents = {
            index: Expected.of(node.meta["val"])
            for (kind, index), node in arguments
            if kind == "tangent"
        }
        grads = [
            (i, s.name)
            for i, s in enumerate(_returned(signature.outputs[self.num_outputs :]))
            if s.role is Role.GRAD
        ]
        self.gradients = tuple(
            (i, self._position[name], frozenset(sources))
            for (i, name), sources in zip(grads, self.plan.gradient_sources, strict=True)
        )
        # Only what receives a gradient passes through autograd; the rest rides along.
        self.differentiable = tuple(index for _, index, _ in self.gradients)
        self.saved_inputs = tuple(
            dict.fromkeys(
                i
                for kind, i in self.halves.sources
                if kind == "input" and self.slots[i].role is not Role.STATE
            )
        )

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the model for its flat inputs, connected to autograd."""
        values = self._with_state(inputs)
        differentiable = (values[i] for i in self.differentiable)
        computed: tuple[Tensor, ...] = _Step.apply(self, values, *differentiable)  # type: ignore[no-untyped-call]
        return self._assemble(values, computed)

    def run_forward(self, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The model's computed outputs and the values to save."""
        with torch._C._DisableAutocast():
            results = self.forward(list(values))
        self._write_back(Phase.FORWARD, values, results)
        outputs = [results[i] for i, _ in self._outputs]
        return outputs, list(results[self.num_outputs :])

    def run_backward(
        self,
        saved: list[Tensor],
        inputs: dict[int, Tensor],
        tangents: Sequence[Tensor | None],
        call: Any = None,
    ) -> list[Tensor | None]:
        """One gradient per differentiable input; ``None`` where no tangent reaches it.

        Args:
            saved: values that the forward saved; emptied.
            inputs: inputs of the step that the backward reads, by position.
            tangents: one per computed output.
            call: what `Backwards.forward_made` gave when the forward ran.
        """
        given = [tangents[i] for i in self.tangent_of_output]
        factor = self.backward.tangent_factor(call)
        if factor != 1.0:
            given = [None if t is None else t * factor for t in given]
        slots = self.slots
        arguments: list[Any] = []
        for kind, index in self.halves.sources:
            if kind == "saved":
                arguments.append(saved[index])
            elif kind == "tangent":
                arguments.append(self.tangents[index].coerce(given[index]))
            elif slots[index].role is Role.STATE:
                arguments.append(self.state[slots[index].name])
            else:
                arguments.append(self.weights_for_backward.get(slots[index].name, inputs[index]))
        saved.clear()
        live = {i for i, t in enumerate(given) if t is not None}
        absent = {i for i, _, sources in self.gradients if not live & sources}
        with torch._C._DisableAutocast():
            results = self.backward(arguments, call, absent)
        if self._mutations[Phase.BACKWARD]:
            everything = [self.state.get(s.name, inputs.get(i)) for i, s in enumerate(slots)]
            self._write_back(Phase.BACKWARD, cast("list[Tensor]", everything), results)
        factor = self.backward.input_factor(call)
        return [
            results[i] * factor
            if factor != 1.0 and results[i] is not None and slots[at].role is Role.INPUT
            else results[i]
            for i, at, _ in self.gradients
        ]


def _changeable(outputs: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, such that the caller may change them in place where eager allows it.

    Autograd refuses to change a view that a custom function returns. Without its mark as a view an
    output may be changed, but the change no longer shows in the version counter of its base, so a
    view whose memory the backward needs keeps the mark.
    """
    if not any(t._is_view() for t in outputs):
        return tuple(outputs)
    needed = {t.untyped_storage().data_ptr() for t in saved}
    return tuple(
        torch.ops.aten._unsafe_view.default(t, t.shape)
        if t._is_view() and t.untyped_storage().data_ptr() not in needed
        else t
        for t in outputs
    )


class _Step(torch.autograd.Function):
    """One training step's model part as a node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, engine: TrainingEngine, values: list[Tensor], *differentiable: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, saved = engine.run_forward(values)
        ctx.engine = engine
        ctx.call = engine.backward.forward_made(values, outputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, *(values[i] for i in engine.saved_inputs))
        returned = _changeable(outputs, saved)
        with_tangent = set(engine.tangent_of_output)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(returned) if i not in with_tangent))
        return returned

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "the backward of a captured step was called with create_graph=True, and it cannot "
                "be differentiated again",
                hint="use the model without graphopt where you need second derivatives",
            )
        engine: TrainingEngine = ctx.engine
        tensors = list(ctx.saved_tensors)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.maybe_clear_saved_tensors()
        count = len(tensors) - len(engine.saved_inputs)
        inputs = dict(zip(engine.saved_inputs, tensors[count:], strict=True))
        saved = tensors[:count]
        del tensors
        return (None, None, *engine.run_backward(saved, inputs, tangents, ctx.call))
