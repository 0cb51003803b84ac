"""Running a graph on real inputs, to see what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
        ArgumentError: the part of graphopt that makes inputs up is not installed.
    """
    try:
        from graphopt.testing.inputs import inputs_for
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"making up inputs for a .gopt file needs {error.name}",
            hint="pip install 'graphopt[testing]', or name a model",
        ) from error
    values = dict(zip(graph.signature.inputs, inputs_for(graph, SEED), strict=True))

    def value(slot: Slot) -> Tensor:
        owner, _, what = slot.name.partition("/")
        return (states[owner][what] if slot.role is Role.STATE else values[slot]).clone()

    def observe(graph: Graph) -> Observed:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(SEED)
            results = graph.copy().module(*map(value, graph.signature.inputs))
        return Observed(dict(zip(map(str, graph.signature.outputs), results, strict=True)))

    return observe
