"""Run a joint graph, split into halves, behind one autograd function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError, DoubleBackwardError
from graphopt.plan import Plan, Role
from graphopt.runtime.engine.base import Engine
from graphopt.runtime.engine.batched import is_batched, one_by_one
from graphopt.runtime.engine.step import Backward, Forward, Source, Step
from graphopt.runtime.engine.tangents import Taken, taken
from graphopt.runtime.session import Session


class TrainingEngine(Engine):
    """Runs the halves of a step.

    Args:
        plan: what to obey.
        session: of the model.
        forward: the forward half with what surrounds it.
        backward: the backward half with what surrounds it.
        sources: where the arguments of the backward come from.
        numbers: which of the saved values are numbers, ascending.
        sharing: names of gradients that lie in memory which another gradient is.
        sized_by_data: whether outputs may have sizes that depend on data.
    """

    def __init__(
        self,
        plan: Plan,
        session: Session,
        forward: Forward,
        backward: Backward,
        sources: Sequence[Source],
        numbers: Sequence[int] = (),
        sharing: Collection[str] = (),
        sized_by_data: bool = False,
    ) -> None:
        super().__init__(plan, session, forward.returns)
        self.forward, self.backward = forward, backward
        self._saved_from = len(forward.returns)
        self._numbers = tuple(numbers)
        self._sized_by_data = sized_by_data
        self._sharing = tuple(
            i for i, s in enumerate(backward.returns) if s.role is Role.GRAD and s.name in sharing
        )
        self._backward_mutations = self._mutations(backward.returns)
        tangents = [s for s in plan.signature.inputs if s.role is Role.TANGENT]
        # Tangents belong to outputs of the model; the autograd function returns the computed ones.
        computed = [position for _, position in self._outputs]
        self.tangent_of_output = tuple(computed.index(int(t.name)) for t in tangents)
        grads = [(i, s.name) for i, s in enumerate(backward.returns) if s.role is Role.GRAD]
        self.gradients = tuple(
            (i, name, frozenset(reaching))
            for (i, name), reaching in zip(grads, plan.gradient_sources, strict=True)
        )
        self._absent_of: dict[frozenset[int], frozenset[str]] = {}
        self._independent_of: dict[frozenset[int], frozenset[int]] = {}
        # Only what receives a gradient passes through autograd; the rest rides along.
        self.differentiable = tuple(self._position[name] for _, name in grads)
        read = {i: self.slots[i].role for kind, i in sources if kind == "input"}
        self.sizes_read = tuple(i for i, role in read.items() if role is Role.SIZE)
        self.saved_inputs = tuple(
            i for i, role in read.items() if role not in (Role.SIZE, Role.STATE)
        )
        self._parameters = tuple(
            (i, s.name) for i, s in enumerate(self.slots) if s.role is Role.PARAM and plan.parts
        )
        self._plain_inputs = tuple(
            i for i, s in enumerate(self.slots) if s.role is Role.INPUT and plan.parts
        )
        named = dict(self._parameters).values()
        self._parameter_gradients = {name: i for i, name in grads if name in set(named)}
        parts = session.parts(plan)
        self._finishing = [(run, part) for run, part in reversed(parts) if run.finishes(part)]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the model for its flat inputs, connected to autograd."""
        values = self._with_state(inputs)
        differentiable = (values[i] for i in self.differentiable)
        # `Function.apply` looks at every argument for what dead transforms have left.
        transformed = torch._C._are_functorch_transforms_active()
        whose: Any = _GraphoptStep if transformed else super(torch.autograd.Function, _GraphoptStep)
        computed: tuple[Tensor, ...] = whose.apply(self, values, *differentiable)
        return self._assemble(values, computed)

    def begin(self, values: Sequence[Tensor]) -> Step:
        """A step on these inputs."""
        if not self.plan.parts:
            return Step()
        batched = (values[i] for i in self._plain_inputs)
        return Step(
            parameters={name: values[i] for i, name in self._parameters},
            examples=max(1, next((v.shape[0] for v in batched if v.dim()), 1)),
            ends=self.session.synchronise,
        )

    def run_forward(self, step: Step, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The model's computed outputs and the values to save."""
        try:
            with torch._C._DisableAutocast():
                results = self.forward(step, list(values))
            self._write_back(self._forward_mutations, values.__getitem__, results)
        except BaseException:
            if step.before is not None:
                step.before.restore()
            raise
        step.before = None
        outputs = [results[i] for i, _ in self._outputs]
        if self._sized_by_data:
            with_tangent = [outputs[i] for i in self.tangent_of_output]
            step.geometry = [(t.shape, t.stride()) for t in with_tangent]
        return outputs, list(results[self._saved_from :])

    def part_numbers(self, saved: list[Any]) -> list[Any]:
        """Take the numbers out of the saved values; autograd keeps tensors only."""
        return [saved.pop(i) for i in reversed(self._numbers)]

    def join_numbers(self, saved: list[Any], numbers: Sequence[Any]) -> None:
        """Put them back in their places."""
        for place, number in zip(self._numbers, reversed(numbers), strict=True):
            saved.insert(place, number)

    def run_backward(self, step: Step, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient per differentiable input; ``None`` where no tangent reaches it.

        Args:
            step: with what its forward saved, which is taken.
            tangents: one per computed output.
        """
        step.scale = 1.0
        absent = self._absent(self.live(tangents))
        given = Taken(tangents[i] for i in self.tangent_of_output)
        if isinstance(tangents, Taken):
            tangents.clear()
        with torch._C._DisableAutocast():
            results = self.backward(step, given, absent)
            if self._backward_mutations:
                at = lambda i: self._input_at(i, step.inputs)  # noqa: E731
                self._write_back(self._backward_mutations, at, results)
            if self.plan.parts:
                self._finish(step, results)
        self.session.count(step)
        for i in self._sharing:
            # Autograd copies a gradient that somebody else holds, and a view holds its base.
            if results[i] is not None:
                results[i] = results[i].detach()
        return [results[i] for i, _, _ in self.gradients]

    def again(
        self, step: Step, saved: Sequence[Any], numbers: Sequence[Any]
    ) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]:
        """The backward of a step, to be run several times on the same saved values.

        Raises:
            ArgumentError: a method sees every step, and this is none.
        """
        if self.plan.parts:
            raise ArgumentError(
                "several tangents at once (is_grads_batched, jacobian with vectorize) make no "
                f"step, and {self.plan.parts[0].name} has to see steps",
                hint="optimize the model that you differentiate so with passes='cleanup'",
            )

        def run(tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            step.saved = list(saved)
            self.join_numbers(step.saved, numbers)
            return self.run_backward(step, tangents)

        return run

    def live(self, tangents: Sequence[Tensor | None]) -> frozenset[int]:
        """Which tangents there are, of one per computed output."""
        places = enumerate(self.tangent_of_output)
        return frozenset(i for i, place in places if tangents[place] is not None)

    def _absent(self, live: frozenset[int]) -> frozenset[str]:
        """Names of the gradients that none of these tangents reaches."""
        if live not in self._absent_of:
            names = (name for _, name, reaching in self.gradients if not live & reaching)
            self._absent_of[live] = frozenset(names)
        return self._absent_of[live]

    def independent_of(self, live: frozenset[int]) -> frozenset[int]:
        """The other tangents that have no gradient in common with one of these."""
        if self.plan.parts:  # methods see a step once
            return frozenset()
        if live not in self._independent_of:
            shared = [reaching for *_, reaching in self.gradients if live & reaching]
            everything = frozenset(range(len(self.tangent_of_output)))
            self._independent_of[live] = everything.difference(live, *shared)
        return self._independent_of[live]

    def _finish(self, step: Step, results: list[Any]) -> None:
        """Let the parts do what a step ends with, on its gradients over all micro-batches."""
        if self._finishing:
            names = self._parameter_gradients
            gradients = {n: results[i] for n, i in names.items() if results[i] is not None}
            if step.ends:
                for name, before in self.session.take(step.parameters, names).items():
                    gradients[name] = before + gradients[name] if name in gradients else before
            for runtime, part in self._finishing:
                self.session.finish(runtime, part, step, gradients)
            for name, index in names.items():
                results[index] = gradients.get(name)
        self.session.pending = not step.ends


def _changeable(outputs: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, such that the caller may change them in place where eager allows it.

    Autograd refuses to change a view that a custom function returns. Without its mark as a view an
    output may be changed, but the change no longer shows in the version counter of its base, so a
    view whose memory the backward needs keeps the mark.
    """
    if not any(isinstance(t, Tensor) and t._is_view() for t in outputs):
        return tuple(outputs)
    needed = {t.untyped_storage().data_ptr() for t in saved}
    return tuple(
        torch.ops.aten._unsafe_view.default(t, t.shape)
        if isinstance(t, Tensor) and t._is_view() and t.untyped_storage().data_ptr() not in needed
        else t
        for t in outputs
    )


def _saved(ctx: Any, live: frozenset[int]) -> list[Tensor]:
    """What the forward saved, for a backward of these tangents.

    Eager's graph frees what a backward has passed. One node is all or nothing, so it keeps what it
    has where outputs remain that have nothing in common with those: actor and critic, two losses.

    Raises:
        RuntimeError: as in eager, where a backward passes for a second time, or what it needs was
            changed in place.
    """
    again = bool(live) and live <= ctx.later
    if again and any(tensor._version != version for tensor, version in ctx.kept):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation, since another output was differentiated"
        )
    tensors: list[Tensor] = [t for t, _ in ctx.kept] if again else list(ctx.saved_tensors)
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.maybe_clear_saved_tensors()
        others = ctx.engine.independent_of(live)
        ctx.later = ctx.later & others if again else others
        ctx.kept = [(tensor, tensor._version) for tensor in tensors] if ctx.later else []
    return tensors


class _GraphoptStep(torch.autograd.Function):
    """One training step's model part as a node of autograd.

    Attributes:
        takes_any_strides: of tangents; each gets the strides that the graph was traced for.
    """

    takes_any_strides = True

    @staticmethod
    def forward(
        ctx: Any, engine: TrainingEngine, values: list[Tensor], *differentiable: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.engine = engine
        ctx.step = engine.begin(values)
        outputs, saved = engine.run_forward(ctx.step, values)
        ctx.numbers = engine.part_numbers(saved)
        ctx.sizes = {i: values[i] for i in engine.sizes_read}
        ctx.set_materialize_grads(False)
        ctx.kept, ctx.later = [], frozenset()
        ctx.save_for_backward(*saved, *(values[i] for i in engine.saved_inputs))
        returned = _changeable(outputs, saved)
        with_tangent = set(engine.tangent_of_output)
        ctx.mark_non_differentiable(
            *(t for i, t in enumerate(returned) if i not in with_tangent and isinstance(t, Tensor))
        )
        return returned

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "the backward of a captured step was called with create_graph=True, and it cannot "
                "be differentiated again",
                hint="compute the first gradient inside of forward, by torch.func.grad; or use the "
                "model without graphopt where you need second derivatives",
            )
        engine: TrainingEngine = ctx.engine
        tensors = _saved(ctx, engine.live(tangents))
        count = len(tensors) - len(engine.saved_inputs)
        step: Step = ctx.step
        step.inputs = dict(zip(engine.saved_inputs, tensors[count:], strict=True)) | ctx.sizes
        if is_batched(tangents):
            gradients = one_by_one(engine.again(step, tensors[:count], ctx.numbers), tangents)
        else:
            step.saved = tensors[:count]
            engine.join_numbers(step.saved, ctx.numbers)
            del tensors
            gradients = engine.run_backward(step, taken(tangents))
        step.inputs = {}
        return (None, None, *gradients)
