"""Running a graph on real inputs, to see what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.cli.model import SEED, Example
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.model.comparison import Observed
from graphopt.model.trial import Trial
from graphopt.plan import Plan, Role, Slot

if TYPE_CHECKING:
    from graphopt.capture import Capture

Observe = Callable[[Graph], Observed]
# Tensors that passes own, by pass and name.
States = dict[str, dict[str, Tensor]]


# Of the free memory, what one tensor may take.
_SHARE = 0.8


def _check_memory(graph: Graph) -> None:
    """Whether the tensors of a graph fit into this machine, as far as their sizes are known.

    Raises:
        ArgumentError: one alone, or all inputs together, do not.
    """
    there = _free_memory()
    if there is None:
        return
    largest, inputs = ("", 0), 0
    for node in graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if isinstance(value, Tensor):
                size = _bytes(value)
                inputs += size if node.op == "placeholder" else 0
                largest = max(largest, (node.name, size), key=lambda pair: pair[1])
    name, size = largest if largest[1] > inputs else ("all inputs together", inputs)
    if size > _SHARE * there:
        raise ArgumentError(
            f"{name} would take {size >> 30:,} GiB, and {there >> 30:,} GiB are free here",
            hint="run it on a machine with more memory, or write smaller sizes in the text",
        )


def _bytes(value: Tensor) -> int:
    """What a tensor takes; of symbolic sizes those of the captured call."""
    shape: Iterable[Any] = value.shape
    sizes = (s.node.hint if isinstance(s, torch.SymInt) else s for s in shape)
    return math.prod(1 if s is None else int(s) for s in sizes) * value.dtype.itemsize


def _free_memory() -> int | None:
    """Bytes that the system can give to this process; ``None`` where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def by_eager(example: Example) -> Observed:
    """What the example's call computes in PyTorch eager: outputs, gradients, buffers."""
    trial = Trial(example.model, example.args, example.kwargs)
    return trial.observe(type(example.model).forward)


def on_example(example: Example, captured: Capture, states: States) -> Observe:
    """Runs graphs in place of the model, on the example's own inputs.

    Args:
        example: the model and its call.
        captured: how the call was captured.
        states: the tensors that passes own; read when a graph runs.
    """
    from graphopt.runtime.backends import build
    from graphopt.runtime.session import Session

    session = Session()

    def observe(graph: Graph) -> Observed:
        plan = Plan(
            spec="",
            signature=graph.signature,
            gradient_sources=graph.get(gradient_sources),
            aliases=captured.aliases,
        )
        session.states.update(states)
        call = captured.bind(build(graph.module, plan, session))
        return Trial(example.model, example.args, example.kwargs, session.trial).observe(call)

    return observe


def on_made_up_inputs(graph: Graph, states: States) -> Observe:
    """Runs a graph, and what passes make of it, on inputs made up for its signature.

    Args:
        graph: the graph before any pass.
        states: the tensors that passes own; read when a graph runs.

    Raises:
        ArgumentError: its tensors do not fit into this machine.
    """
    from graphopt.testing.inputs import inputs_for

    _check_memory(graph)
    values = dict(zip(graph.signature.inputs, inputs_for(graph, SEED), strict=True))

    def value(slot: Slot) -> Tensor:
        owner, _, what = slot.name.partition("/")
        return (states[owner][what] if slot.role is Role.STATE else values[slot]).clone()

    def observe(graph: Graph) -> Observed:
        _check_memory(graph)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(SEED)
            try:
                results = graph.copy().module(*map(value, graph.signature.inputs))
            except Exception as error:
                raise ArgumentError(
                    f"the graph cannot be run on made-up inputs: {str(error).split(chr(10))[0]}",
                    hint="name a model and its example inputs, or look at the graph with "
                    "graphopt show",
                ) from error
        return Observed(dict(zip(map(str, graph.signature.outputs), results, strict=True)))

    return observe
