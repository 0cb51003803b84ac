"""How far the results of a step move when one layer alone runs in a lower format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from graphopt.analysis.arguments import step_arguments
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.plan import Role, Slot


@runtime_checkable
class LowersAlone(Protocol):
    """A pass that can lower a part of a graph, whatever it gains."""

    def layers(self, graph: Graph) -> dict[str, tuple[str, ...]]:
        """The operators that may be lowered, by the module that they come from, in order."""

    def alone(self, graph: Graph, operators: Iterable[str]) -> Graph:
        """A copy of the graph in which only these operators are lowered."""


@dataclass(frozen=True)
class LayerError:
    """What one layer moves, in the norm of all results together.

    Attributes:
        layer: its module.
        operators: how many were lowered.
        output: relative error of the model's outputs; ``None`` where they are zero or not finite.
        gradient: of all gradients.
    """

    layer: str
    operators: int
    output: float | None
    gradient: float | None


def layer_errors(
    graph: Graph, pass_: LowersAlone, inputs: Sequence[Tensor] | None, seed: int = 0
) -> list[LayerError]:
    """Lower each layer alone, and everything at once in a last row named ``"all"``.

    Args:
        graph: in float32.
        pass_: what lowers.
        inputs: real tensors, one per input that is no tangent; tangents are random signs.
        seed: of tangents and of what the graph draws.

    Raises:
        ArgumentError: there is nothing to lower.
    """
    layers = pass_.layers(graph)
    if not layers:
        raise ArgumentError("no layer can be lowered", hint="see graphopt run M -p SPEC")
    if inputs is None:
        from graphopt.testing.inputs import inputs_for

        arguments = inputs_for(graph, seed)
    else:
        generator = torch.Generator().manual_seed(seed)

        def signs(slot: Slot, fake: Tensor) -> Tensor:
            return 2 * torch.randint(0, 2, tuple(fake.shape), generator=generator) - 1

        arguments = step_arguments(graph, inputs, signs)
    exact = _run(graph, arguments, seed)
    found = []
    everything = [name for names in layers.values() for name in names]
    for layer, names in {**layers, "all": everything}.items():
        moved = _run(pass_.alone(graph, names), arguments, seed)
        errors = [_relative(a, b) for a, b in zip(exact, moved, strict=True)]
        found.append(LayerError(layer, len(names), *errors))
    return found


def _run(graph: Graph, arguments: Sequence[Tensor], seed: int) -> list[list[Tensor]]:
    """Outputs and gradients."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        results = fx.Interpreter(graph.module).run(*arguments)
    slots = list(zip(graph.signature.outputs, results, strict=True))
    return [
        [r for s, r in slots if s.role is role and isinstance(r, Tensor) and r.is_floating_point()]
        for role in (Role.OUTPUT, Role.GRAD)
    ]


def _relative(exact: list[Tensor], moved: list[Tensor]) -> float | None:
    size = sum(float(t.double().square().sum()) for t in exact)
    error = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(exact, moved, strict=True)
    )
    ratio = (error / size) ** 0.5 if size else float("nan")
    return ratio if ratio - ratio == 0 else None
