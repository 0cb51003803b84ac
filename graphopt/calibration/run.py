"""`calibrate`: run a model's captured step on batches and keep what was seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.aliasing import storage
from graphopt.calibration import curvature
from graphopt.calibration.forward import Recorded, record_forward
from graphopt.calibration.ranges import RangeCounter, is_counted, ranges_of
from graphopt.calibration.record import Calibration
from graphopt.calibration.sensitivity import SensitivitySums
from graphopt.capture import Capture, capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, value_of
from graphopt.model.arguments import check_model, split_example_inputs
from graphopt.pipeline import Pipeline
from graphopt.plan import Role

PROBES = 8
Loss = Callable[[Any, Any], Tensor]


def calibrate(
    model: nn.Module,
    batches: object,
    loss: Loss | None = None,
    *,
    probes: int = PROBES,
    seed: int = 0,
) -> Calibration:
    """Find the ranges of all tensors of the step, and how sensitive the loss is to rounding them.

    The model is not changed: neither parameters nor buffers, and `optimize` may have been called.

    Args:
        model: in the mode that it is calibrated for (``train()`` or ``eval()``).
        batches: example inputs as `optimize` takes them, or an iterable of such. With `loss`, each
            is a pair ``(example inputs, target)``, as data loaders give them.
        loss: from the model's output and the target to one number. Without it the model's own, if
            its first output is one number; else half the squared change of the outputs, divided by
            the number of examples. Gradients are then of random signs, divided by that number.
        probes: random vectors per batch for the estimate of the curvature.
        seed: of random numbers, in dropout too.

    Raises:
        ArgumentError: there is no batch, one is no example, or the loss is not one number.
        CaptureError: the model cannot be captured on a batch.
    """
    check_model(model)
    if probes < 1:
        raise ArgumentError(f"probes={probes} is not a number of probes", hint="leave it out for 8")
    found = _Found(loss, probes)
    captured = None
    for number, batch in enumerate(_each(batches)):
        args, kwargs, target = _call(batch, number, with_target=loss is not None)
        if captured is None or not captured.holds(model, *args, **kwargs):
            captured = capture(model, args, kwargs)
            Pipeline.parse("cleanup").run(captured.graph)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed + number)
            found.add(captured, model, args, kwargs, target, number)
    if captured is None:
        raise ArgumentError("there is no batch to calibrate on", hint="give one batch or more")
    for note in found.notes:
        warnings.warn(f"calibration: {note}", stacklevel=2)
    return Calibration(
        model=type(model).__name__,
        torch=torch.__version__,
        parameters=_parameters(captured.graph),
        batches=found.batches,
        samples=found.samples,
        loss=found.kind,
        value=sum(found.values) / len(found.values) if found.values else None,
        tensors=ranges_of(found.counters),
        sensitivities=found.sums.found(),
        notes=tuple(found.notes),
    )


def _each(batches: object) -> Iterator[object]:
    if isinstance(batches, Tensor | tuple | Mapping):
        yield batches
    elif isinstance(batches, Iterable):
        yield from batches
    else:
        raise ArgumentError(
            f"batches are a {type(batches).__name__}, which is neither a batch nor several",
            hint="calibrate(model, [batch, batch])",
        )


def _call(
    batch: object, number: int, *, with_target: bool
) -> tuple[tuple[Any, ...], dict[str, Any], object]:
    target = None
    if with_target:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ArgumentError(
                f"with a loss, batch {number} has to be a pair of inputs and target",
                hint="calibrate(model, [(inputs, target), ...], loss)",
            )
        batch, target = batch
    example = split_example_inputs(batch)
    if example is None:
        raise ArgumentError(f"batch {number} is None", hint="calibrate(model, [batch, batch])")
    return *example, target


def _parameters(graph: Graph) -> dict[str, tuple[int, ...]]:
    slots = zip(graph.signature.inputs, graph.inputs, strict=True)
    return {s.name: tuple(value_of(n).shape) for s, n in slots if s.role is Role.PARAM}


@dataclass
class _Found:
    """What is known after some batches."""

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
        samples = _samples((*args, *kwargs.values()))
        self.batches, self.samples = self.batches + 1, self.samples + samples
        outputs = {i: t for i, t in run.outputs.items() if t.is_floating_point()}
        if empty := not any(t.numel() for t in outputs.values()):
            self.notes.append(f"batch {number} is empty")
        loss = self._loss(returned, target, outputs)
        leaves = curvature.differentiable(list(outputs.values()))
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
        if finite and leaves and not empty:
            if loss is not None:
                self.values.append(float(loss.detach()))
            try:
                self._sensitivity(graph, run, loss, leaves, tangents, samples, number)
            except RuntimeError as error:
                said = str(error).splitlines()[0]
                self._note(f"sensitivities cannot be found: {said}")
        elif leaves and not empty:
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
        given = iter(inputs)
        arguments = []
        for slot, node in zip(graph.signature.inputs, graph.inputs, strict=True):
            if slot.role is not Role.TANGENT:
                arguments.append(next(given).detach())
                continue
            fake = value_of(node)
            tangent = torch.zeros_like(fake, device=fake.device)
            arguments.append(tangent)
        counting = _Counting(graph.module, self.counters)
        with torch.no_grad():
            counting.run(*_filled(graph, arguments, tangents))
        return counting.nan

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _filled(
    graph: Graph, arguments: list[Tensor], tangents: Mapping[int, Tensor]
) -> Iterator[Tensor]:
    """The arguments, with real tangents in the geometry that the graph was derived for."""
    for slot, node, value in zip(graph.signature.inputs, graph.inputs, arguments, strict=True):
        if slot.role is Role.TANGENT:
            fake = value_of(node)
            real = torch.empty_strided(
                tuple(fake.shape), tuple(fake.stride()), dtype=fake.dtype, device=fake.device
            )
            tangent = tangents.get(int(slot.name))
            yield real.zero_() if tangent is None else real.copy_(tangent.detach())
        else:
            yield value


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
        if alias.offset >= 0:
            base = base.as_strided(alias.size, alias.stride, alias.offset)
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
