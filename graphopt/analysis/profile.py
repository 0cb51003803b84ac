"""How long each node of a step takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.hints import empty_at_hint, hint
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, value_of


def profile_graph(
    graph: Graph, inputs: Sequence[Tensor | int] | None = None, rounds: int = 3
) -> dict[fx.Node, float]:
    """Median seconds of every operator of `graph`, each run on its own, one after the other.

    A warm-up round is not counted. Random streams are left untouched. The graph must not contain
    collectives yet: a rank that runs it alone would wait for the others.

    Args:
        graph: the step; its operators run on the devices of their fake values.
        inputs: one real tensor per input, or a number for a size; by default random floats, and
            zeros for whole numbers, which are valid as positions everywhere. They are copied, since
            the step may write.
        rounds: how many runs the median is over.

    Raises:
        ArgumentError: `rounds` is not positive, or there is not one tensor per input.
    """
    return profile_in_turn([graph], inputs, rounds)[0]


def profile_in_turn(
    graphs: Sequence[Graph],
    inputs: Sequence[Tensor | int] | None = None,
    rounds: int = 3,
    of_rounds: Callable[[Sequence[float]], float] = statistics.median,
) -> list[dict[fx.Node, float]]:
    """`profile_graph` for several forms of one step, so that they can be compared.

    Each of them runs once per round, so that a slow spell of the machine hits all of them.

    Args:
        graphs: the forms, with the same inputs.
        inputs: as of `profile_graph`.
        rounds: how many runs.
        of_rounds: what the time of an operator is, of its times in all rounds. ``min`` is what it
            takes where nothing else runs: whatever else a machine does only adds.
    """
    if rounds < 1:
        raise ArgumentError(f"rounds is {rounds}", hint="measure at least one round")
    if inputs is None:
        inputs = random_inputs(graphs[0])
    if len(inputs) != len(graphs[0].inputs):
        raise ArgumentError(
            f"{len(inputs)} tensors for {len(graphs[0].inputs)} inputs",
            hint="give one per placeholder, or none at all",
        )
    runs: list[list[dict[fx.Node, float]]] = [[] for _ in graphs]
    with torch.random.fork_rng(), torch.no_grad():
        for _ in range(rounds + 1):
            for graph, mine in zip(graphs, runs, strict=True):
                stopwatch = _Stopwatch(graph.module)
                stopwatch.run(*copied(inputs))
                mine.append(stopwatch.seconds)
    return [
        {node: of_rounds([run[node] for run in mine[1:]]) for node in graph.operators}
        for graph, mine in zip(graphs, runs, strict=True)
    ]


def random_inputs(graph: Graph) -> list[Tensor | int]:
    """Random floats, zeros for whole numbers and a number per size: valid, if not typical, inputs.

    Raises:
        ArgumentError: an input is neither a tensor nor a size.
    """
    return [_random(node) for node in graph.inputs]


def copied(inputs: Sequence[Tensor | int]) -> list[Tensor | int]:
    """Copies for a step that may write into its inputs."""
    return [value.clone() if isinstance(value, Tensor) else value for value in inputs]


class _Stopwatch(fx.Interpreter):
    """Runs a graph and keeps the time of each operator."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        on_gpu = _on_gpu(n)
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = super().run_node(n)
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds[n] = time.perf_counter() - started
        return result


def _on_gpu(node: fx.Node) -> bool:
    values = [value_of(other) for other in (node, *node.all_input_nodes)]
    flat = [v for value in values for v in (value if isinstance(value, tuple | list) else (value,))]
    return any(isinstance(v, Tensor) and v.device.type == "cuda" for v in flat)


def _random(node: fx.Node) -> Tensor | int:
    fake = value_of(node)
    if (size := hint(fake) if isinstance(fake, torch.SymInt) else None) is not None:
        return size
    if not isinstance(fake, Tensor):
        raise ArgumentError("an input is not a tensor", where=node.name)
    real = empty_at_hint(fake)
    if not (fake.dtype.is_floating_point or fake.dtype.is_complex):
        return real.zero_()
    # A fresh generator, so that two calls time the same numbers.
    generator = torch.Generator().manual_seed(0)
    # Not negative, since a buffer may be a variance.
    return real.copy_(torch.rand(real.shape, generator=generator) + 0.5)
