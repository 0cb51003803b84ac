"""What `graphopt plan` and `graphopt simulate` both ask of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.analysis.gradient_order import GradientOrder
    from graphopt.graph import Graph


def ranks_of(mesh: str, command: str) -> int:
    """The number of data-parallel ranks in a mesh such as ``dp=64``.

    Args:
        mesh: what the user wrote.
        command: which command has no use for other dimensions.

    Raises:
        ArgumentError: there is no ``dp``, or another dimension beside it.
    """
    from graphopt.model.arguments import parse_mesh

    sizes = dict(parse_mesh(mesh))
    world = sizes.pop("dp", 0)
    if not world:
        raise ArgumentError(
            f"--mesh {mesh} has no dp", hint="gradients are reduced over dp: --mesh dp=64"
        )
    if sizes:
        raise ArgumentError(
            f"--mesh {mesh} has dimensions that {command} does not know: {', '.join(sizes)}",
            hint=f"--mesh dp={world}",
        )
    return world


def gradients_of(graph: Graph, name: str, order: Callable[[Graph], GradientOrder]) -> GradientOrder:
    """When the gradients of a graph are ready.

    Args:
        graph: as it was captured.
        name: of the model, for the error.
        order: how to find out; only asked where there is a backward pass.

    Raises:
        ArgumentError: no gradient has to be reduced.
    """
    from graphopt.graph import Level

    found = order(graph) if graph.level is Level.JOINT else None
    if found is None or not found.ready:
        raise ArgumentError(
            f"no parameter of {name} receives a gradient, so nothing has to be reduced",
            hint="check requires_grad of its parameters, and that its output depends on them",
        )
    return found
