"""`calibrate`: run a model's captured step on batches and keep what was seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.calibration.batches import Batches, Loss
from graphopt.calibration.ranges import ranges_of
from graphopt.calibration.record import Calibration
from graphopt.capture import capture
from graphopt.capture.forward import Rewriter
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, value_of
from graphopt.model.arguments import check_model, split_example_inputs
from graphopt.model.controller import controller_of
from graphopt.notices import warn
from graphopt.pipeline import Pipeline
from graphopt.plan import Role

PROBES = 8


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
    found = Batches(loss, probes)
    captured = None
    for number, batch in enumerate(_each(batches)):
        args, kwargs, target = _call(batch, number, with_target=loss is not None)
        if captured is None or not captured.holds(model, *args, **kwargs):
            captured = capture(model, args, kwargs, rewrite=_rewriter(model))
            Pipeline.parse("cleanup").run(captured.graph)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed + number)
            found.add(captured, model, args, kwargs, target, number)
    if captured is None:
        raise ArgumentError("there is no batch to calibrate on", hint="give one batch or more")
    for note in found.notes:
        warn(f"calibration: {note}")
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


def _rewriter(model: nn.Module) -> Rewriter | None:
    """What an optimized model does with its forward graph: names are those of its steps."""
    controller = controller_of(model)
    return controller.compiler.rewriter() if controller is not None else None


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
