"""Runs a call with and without padding, and compares."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from graphopt.data.dropout import without_dropout
from graphopt.data.leaks import Recorder
from graphopt.data.padded_call import Call
from graphopt.data.positions import Padded, closest
from graphopt.errors import ArgumentError
from graphopt.model.cotangents import cotangent
from graphopt.model.tensors import tensors_of

# A gradient that is zero but for rounding, such as that of a key's bias, is compared relative to
# this part of the largest one.
SMALL = 1e-2

Kind: TypeAlias = Literal["outputs", "loss", "gradients", "buffers", "rows"]


@dataclass(frozen=True)
class Compared:
    """What one kind of result became by padding.

    Attributes:
        kind: of result.
        error: the largest difference, relative to the largest magnitude of the tensor; of a
            gradient at least to a hundredth of the largest gradient.
        worst: the result that has it.
    """

    kind: Kind
    error: float
    worst: str


@dataclass
class Run:
    """What one call computed.

    Attributes:
        outputs: by path.
        gradients: of parameters, by name.
        buffers: those that were written, by name.
        cotangents: of the outputs that are differentiable.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    cotangents: dict[str, Tensor] = field(default_factory=dict)


def run(
    call: Call,
    tensors: Mapping[str, Tensor],
    without: Run | None = None,
    layout: Padded | None = None,
) -> Run:
    """Forward and backward, on a copy of the model and without dropout.

    Args:
        call: the call.
        tensors: its arguments that are exchanged.
        without: what ran without padding, and gives the cotangents: zero at padded positions.
        layout: of the padding.

    Raises:
        ArgumentError: the model cannot be copied, forward fails, or it draws random numbers.
    """
    model = _copy(call.model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    more = f"with {layout.more} padded positions" if layout else ""
    with _steady(model):
        start = torch.get_rng_state()
        outputs = _forward(call, model, tensors, more)
        if not torch.equal(start, torch.get_rng_state()):
            raise ArgumentError(
                "forward draws random numbers, which are others where shapes are",
                hint="switch noise off in the model that is checked; dropout is off already",
            )
        found = Run({f"output {n}": t.detach() for n, t in outputs.items()})
        _differentiate(found, model, outputs, without, layout)
    changed = {n: b for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    found.buffers = {f"buffer {n}": b.detach() for n, b in changed.items()}
    return found


def forward(call: Call, tensors: Mapping[str, Tensor], how: str) -> dict[str, Tensor]:
    """Forward alone, in the same way; its outputs by path.

    Args:
        call: the call.
        tensors: its arguments that are exchanged.
        how: what is special about them, for errors.

    Raises:
        ArgumentError: the model cannot be copied, or forward fails.
    """
    model = _copy(call.model)
    with _steady(model):
        return _forward(call, model, tensors, how)


def record(call: Call, tensors: Mapping[str, Tensor], recorder: Recorder) -> None:
    """Run forward alone, and keep every operator in `recorder`."""
    model = _copy(call.model)
    with _steady(model), recorder.follow(model):
        recorder.outputs = _forward(call, model, tensors, "")


def compare(without: Run, padded: Run, layout: Padded) -> tuple[Compared, ...]:
    """The worst of each kind of result that there is."""
    outputs = _errors(without.outputs, padded.outputs, layout)
    losses = {n for n in outputs if n in without.outputs and without.outputs[n].dim() == 0}
    present = [g for g in without.gradients.values() if g is not None and g.numel()]
    least = SMALL * max((float(g.abs().max()) for g in present), default=0.0)
    kinds: dict[Kind, dict[str, float]] = {
        "outputs": {n: e for n, e in outputs.items() if n not in losses},
        "loss": {n: e for n, e in outputs.items() if n in losses},
        "gradients": _errors(without.gradients, padded.gradients, layout, least),
        "buffers": _errors(without.buffers, padded.buffers, layout),
    }
    return tuple(
        Compared(kind, max(errors.values()), max(errors, key=lambda n: errors[n]))
        for kind, errors in kinds.items()
        if errors
    )


def _errors(
    without: Mapping[str, Tensor | None],
    padded: Mapping[str, Tensor | None],
    layout: Padded,
    least: float = 0.0,
) -> dict[str, float]:
    errors = {}
    for name in sorted(without.keys() | padded.keys()):
        one, two = without.get(name), padded.get(name)
        if one is None or two is None:
            errors[name] = 0.0 if one is two else float("inf")
            continue
        place = closest(one, two, layout, least)
        errors[name] = float("inf") if place is None else place.error
    return errors


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"the model cannot be copied: {error}",
            hint="check a model that copy.deepcopy can copy, such as one that has not run yet",
        ) from error


@contextmanager
def _steady(model: nn.Module) -> Iterator[None]:
    """Within, a copy of the model drops nothing and begins with the same random numbers."""
    with torch.random.fork_rng(), without_dropout(model):
        torch.manual_seed(0)
        yield


def _forward(
    call: Call, model: nn.Module, tensors: Mapping[str, Tensor], how: str
) -> dict[str, Tensor]:
    try:
        # Not those in objects: a cache has its positions elsewhere, those of padding among them.
        return dict(tensors_of(call(model, tensors), in_objects=False))
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "pass arguments with which it runs"
        if how:
            hint = "pass shorter examples, and name all arguments that are padded"
        name = type(model).__name__
        raise ArgumentError(
            f"forward of {name} failed {how}".rstrip() + f": {said}", hint=hint
        ) from error


def _differentiate(
    found: Run,
    model: nn.Module,
    outputs: Mapping[str, Tensor],
    without: Run | None,
    layout: Padded | None,
) -> None:
    """Gradients of the parameters."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ends = {f"output {n}": t for n, t in outputs.items() if t.requires_grad}
    if without is None or layout is None:
        generator = torch.Generator().manual_seed(0)
        for name, output in ends.items():
            loss = output.dim() == 0
            made = torch.ones_like(output) if loss else cotangent(output, generator)
            found.cotangents[name] = made.detach()
    else:
        for name, given in without.cotangents.items():
            if name in ends:
                place = closest(without.outputs[name], found.outputs[name], layout)
                if place is not None:
                    found.cotangents[name] = place.spread(given, ends[name].shape)
    if not found.cotangents or not parameters:
        return
    gradients = torch.autograd.grad(
        [ends[name] for name in found.cotangents],
        list(parameters.values()),
        list(found.cotangents.values()),
        allow_unused=True,
    )
    names = (f"gradient of {name}" for name in parameters)
    found.gradients = dict(zip(names, gradients, strict=True))
