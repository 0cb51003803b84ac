"""What `graphopt plan` and `graphopt simulate` both ask of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.analysis.gradient_order import Device, GradientOrder
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


def check_flops(flops: float | None) -> None:
    """Whether this can be the speed of a device; raises ``ArgumentError``."""
    if flops is not None and not (math.isfinite(flops) and flops > 0):
        raise ArgumentError(
            f"--flops {flops:g} is no speed of a device", hint="--flops 1.5e13 is 15 TFLOP/s"
        )


def assumed_device(flops: float | None) -> Device:
    """What each rank computes with: a GPU of today, as fast as told."""
    from graphopt.analysis.gradient_order import ASSUMED

    device = ASSUMED["cuda"]
    return device if flops is None else replace(device, flops=flops, half_flops=flops)


def words_of(device: Device) -> str:
    """An assumed device in words."""
    from graphopt.render.units import count, duration, size

    return (
        f"roofline of an assumed GPU: {count(device.flops)}FLOP/s ("
        f"{count(device.half_flops)}FLOP/s in 16 bits), {size(device.bandwidth)}/s, "
        f"{duration(device.overhead)} to start an operator; not measured"
    )


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
