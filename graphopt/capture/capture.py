"""One call of a model as one graph, with what it takes to run that graph as the call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphopt.capture.dynamo import by_dynamo
from graphopt.capture.export import by_export
from graphopt.capture.flat import Runner
from graphopt.capture.joint import derive
from graphopt.errors import CaptureError
from graphopt.graph import Graph
from graphopt.plan import OutputAlias

SUPPORTED = ("2.11", "2.14")


@dataclass(frozen=True)
class Capture:
    """One model, captured for one kind of call.

    Attributes:
        graph: the joint graph, or the inference graph where nothing requires a gradient.
        aliases: outputs of the model that are inputs of it, or views of inputs; they are not
            outputs of the graph.
        route: ``"dynamo"`` or ``"export"``.
        seconds: how long the capture took.
        inputs: the live tensors of the captured call, one per primal input of the graph.
        bind: makes a callable ``(model, *args, **kwargs)`` out of a runner over flat tensors.
        holds: whether a call ``(model, *args, **kwargs)`` is one this capture was made for.
        failure: says which condition does not hold for a call.
        notes: what the user should know about how it was captured.
    """

    graph: Graph
    aliases: tuple[OutputAlias, ...]
    route: str
    seconds: float
    inputs: tuple[Tensor, ...]
    bind: Callable[[Runner], Callable[..., object]]
    holds: Callable[..., bool]
    failure: Callable[..., str]
    notes: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    forward: Callable[..., object] | None = None,
) -> Capture:
    """Capture one call of `model` as one graph.

    Args:
        model: any module whose ``forward`` Dynamo or `torch.export` can capture without a break.
        args: positional arguments of the call; live tensors, whose values are not changed.
        kwargs: keyword arguments of the call.
        forward: the unbound ``forward`` to capture; by default the one of the model's class.

    Returns:
        The captured graph, in the mode the call would run in now (``training``, grad mode,
        autocast).

    Raises:
        CaptureError: the call cannot be captured as one graph; names the user's source line.
    """
    _check_version()
    forward = forward or type(model).forward
    start = time.perf_counter()
    try:
        flat = by_dynamo(model, forward, tuple(args), dict(kwargs or {}))
    except CaptureError as refusal:
        flat = by_export(model, forward, tuple(args), dict(kwargs or {}), refusal)
    graph, aliases = derive(flat)
    return Capture(
        graph=graph,
        aliases=aliases,
        route=flat.route,
        seconds=time.perf_counter() - start,
        inputs=flat.inputs,
        bind=flat.bind,
        holds=flat.holds,
        failure=flat.failure,
        notes=flat.notes,
    )


def _check_version() -> None:
    release = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    low, high = (tuple(int(p) for p in v.split(".")) for v in SUPPORTED)
    if not low <= release < high:
        raise CaptureError(
            f"torch {torch.__version__} is outside the supported range "
            f">={SUPPORTED[0]},<{SUPPORTED[1]}",
            hint="install torch 2.13",
        )
