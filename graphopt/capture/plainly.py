"""Calls that a graph turns out not to be for, once their tensors are known: they run plain."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.capture.flat import Bind, Runner
from graphopt.errors import CaptureError


class Declined(Exception):
    """A graph does not hold for this call; nothing has been changed."""


def or_plain(
    bind: Bind,
    plain: Callable[..., object],
    prepare: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    graph: fx.Graph | None,
) -> Bind:
    """A `bind` whose calls run `plain`, from the same random numbers, where the graph declines.

    It declines where `prepare` raises `Declined`, or where a check in the graph fails.

    Args:
        bind: of the graph.
        plain: the user's own forward.
        prepare: from the tensors of the call to those of the graph.
        graph: whose checks may fail; none where there are no checks.
    """
    checks = graph is not None and has_checks(graph)
    draws = checks and graph is not None and any(map(_draws, graph.nodes))

    def with_plain(runner: Runner) -> Callable[..., object]:
        def prepared(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return runner(prepare(tensors))

        def checked(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            try:
                return runner(prepare(tensors))
            except RuntimeError as error:
                raise Declined(str(error)) from error

        bound = bind(checked if checks else prepared)
        parts = getattr(getattr(runner, "plan", None), "parts", ("?",))

        def call(*args: Any, **kwargs: Any) -> object:
            state = random_state() if draws else None
            try:
                return bound(*args, **kwargs)
            except Declined as error:
                if parts:
                    raise _cannot(error) from error.__cause__
                if state is not None:
                    restore_random_state(state)
            return plain(*args, **kwargs)

        return call

    return with_plain


def _cannot(error: Declined) -> CaptureError:
    """For methods that have to see every step, plain steps would be silently other ones."""
    return CaptureError(
        f"this call is not one that the graph was captured for: {error}",
        hint="call the model before optimize, or with passes that need no runtime part",
    )


def has_checks(graph: fx.Graph) -> bool:
    """Whether a graph may raise because a value is not what it was captured for."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns
        for node in graph.nodes
    )


def _draws(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    )


def random_state() -> tuple[object, Tensor, list[Tensor]]:
    """Where the streams of random numbers are, of Python, of the CPU and of GPUs."""
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if initialised else []
    return random.getstate(), torch.get_rng_state(), gpus


def restore_random_state(state: tuple[Any, Tensor, list[Tensor]]) -> None:
    """Put them back there."""
    python, cpu, gpus = state
    random.setstate(python)
    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
