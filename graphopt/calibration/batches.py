"""What the batches of a calibration add up to: each is run, counted and probed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.aliasing import storage
from graphopt.analysis.arguments import step_arguments
from graphopt.calibration import curvature
from graphopt.calibration.forward import Recorded, record_forward
from graphopt.calibration.ranges import RangeCounter, is_counted
from graphopt.calibration.sensitivity import SensitivitySums
from graphopt.capture import Capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Batches:
    """What is known after some batches.

    Attributes:
        loss: from output and target to one number; ``None`` for the model's own or the outputs.
        probes: random vectors per batch.
        kind: of the loss, see `Calibration`.
        batches: how many there were.
        samples: examples in all of them.
        values: losses of the finite ones.
        notes: what is to be known about the data.
        counters: of the magnitudes, by node.
        sums: of the sensitivities.
    """

    loss: Loss | None
    probes: int
    kind: str = "outputs"
    batches: int = 0
    samples: int = 0
    values: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counters: dict[str, RangeCounter] = field(default_factory=dict)
    sums: SensitivitySums = field(default_factory=SensitivitySums)

    def add(
        self,
        captured: Capture,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: object,
        number: int,
    ) -> None:
        """Run one more batch.

        Args:
            captured: this kind of call, with its graph cleaned.
            model: the model.
            args: of the call.
            kwargs: of the call.
            target: for the loss.
            number: of the batch.
        """
        graph = captured.graph
        runs: list[tuple[Recorded, tuple[Tensor, ...]]] = []

        def runner(inputs: Sequence[Tensor]) -> list[Tensor]:
            state = torch.get_rng_state()
            run = record_forward(graph, graph.get(storage).views, inputs)
            torch.set_rng_state(state)
            runs.append((run, tuple(inputs)))
            return _assembled(captured, run, inputs)

        returned = captured.bind(runner)(model, *args, **kwargs)
        run, inputs = runs[-1]
        examples = _samples((*args, *kwargs.values()))
        self.batches, self.samples = self.batches + 1, self.samples + examples
        samples = max(1, examples)
        outputs = {i: t for i, t in run.outputs.items() if t.is_floating_point()}
        loss = self._loss(returned, target, outputs)
        leaves = curvature.differentiable(list(outputs.values()))
        if empty := not (examples and any(t.numel() for t in leaves)):
            self.notes.append(
                f"batch {number} counts for no sensitivity: "
                + ("no output is a differentiable float32 tensor" if examples else "it is empty")
            )
        tangents = self._tangents(loss, leaves, samples)
        by_output = {id(t): g for t, g in zip(leaves, tangents, strict=True)}
        given = {i: by_output[id(t)] for i, t in outputs.items() if id(t) in by_output}
        bad = self._count(graph, inputs, given)
        finite = all(bool(t.isfinite().all()) for t in leaves)
        finite = finite and (loss is None or bool(loss.isfinite()))
        if bad:
            self.notes.append(
                f"batch {number} has NaN in {bad[0]}"
                + (f" and {len(bad) - 1} more tensors" if len(bad) > 1 else "")
            )
        if finite and not empty:
            if loss is not None:
                self.values.append(float(loss.detach()))
            try:
                self._sensitivity(graph, run, loss, leaves, tangents, samples, number)
            except RuntimeError as error:
                said = str(error).splitlines()[0]
                self._note(f"sensitivities cannot be found: {said}")
        elif not empty:
            self.notes.append(f"batch {number} counts for no sensitivity: its loss is not finite")

    def _loss(self, returned: object, target: object, outputs: dict[int, Tensor]) -> Tensor | None:
        if self.loss is not None:
            self.kind = "given"
            loss = self.loss(returned, target)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise ArgumentError(
                    "the loss is not one number that can be differentiated",
                    hint="return the mean of the examples' losses, as F.cross_entropy does",
                )
            return loss.reshape(())
        first = outputs.get(0)
        if first is not None and first.dim() == 0 and first.requires_grad:
            self.kind = "model"
            return first
        return None

    def _tangents(self, loss: Tensor | None, leaves: list[Tensor], samples: int) -> list[Tensor]:
        if loss is None:
            generator = torch.Generator().manual_seed(self.batches)
            return [curvature.signs(t, generator) / samples for t in leaves]
        # A loss that is an output of the model has no way to itself but the identity.
        found = torch.autograd.grad(
            loss, leaves, retain_graph=True, create_graph=True, allow_unused=True
        )
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]

    def _sensitivity(
        self,
        graph: Graph,
        run: Recorded,
        loss: Tensor | None,
        leaves: list[Tensor],
        tangents: list[Tensor],
        samples: int,
        number: int,
    ) -> None:
        generator = torch.Generator().manual_seed(number)
        if loss is None:

            def diagonal(values: list[Tensor]) -> list[Tensor]:
                return curvature.of_outputs(leaves, values, samples, self.probes, generator)
        elif any(g.requires_grad for g in tangents):

            def diagonal(values: list[Tensor]) -> list[Tensor]:
                curved = [g for g in tangents if g.requires_grad]
                inner = [t for t, g in zip(leaves, tangents, strict=True) if g.requires_grad]
                return curvature.of_loss(curved, inner, values, self.probes, generator)
        else:
            plain = [g.detach() for g in tangents]
            self.sums.add(run, lambda v: curvature.of_fisher(leaves, plain, v, samples), samples)
            self.sums.add_weights(run, graph, leaves, plain, samples)
            return
        self.sums.add(run, diagonal, samples)

    def _count(
        self, graph: Graph, inputs: Sequence[Tensor], tangents: Mapping[int, Tensor]
    ) -> list[str]:
        """Count every tensor of the whole step; returns those that hold NaN."""
        arguments = step_arguments(graph, inputs, lambda slot, _: tangents.get(int(slot.name)))
        counting = _Counting(graph.module, self.counters)
        with torch.no_grad():
            counting.run(*arguments)
        return counting.nan

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class _Counting(fx.Interpreter):
    """Runs a graph and counts every float32 tensor in it."""

    def __init__(self, module: fx.GraphModule, counters: dict[str, RangeCounter]) -> None:
        super().__init__(module)
        self.counters, self.nan = counters, list[str]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output" and is_counted(result):
            counter = self.counters.setdefault(n.name, RangeCounter())
            before = counter.nan
            counter.add(result)
            if counter.nan > before:
                self.nan.append(n.name)
        return result


def _assembled(captured: Capture, run: Recorded, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The model's outputs in order: what was computed, and views of inputs."""
    outputs = dict(run.outputs)
    for alias in captured.aliases:
        base = inputs[alias.input]
        if alias.is_view:
            size, stride, offset = alias.geometry(inputs)
            base = base.as_strided(size, stride, base.storage_offset() + offset)
        outputs[alias.output] = base.detach() if alias.detached else base
    return [outputs[i] for i in sorted(outputs)]


def _samples(arguments: Iterable[object]) -> int:
    """Leading dimension of the first tensor of a call."""
    for value in arguments:
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
        if isinstance(value, tuple | list):
            return _samples(value)
    return 1
