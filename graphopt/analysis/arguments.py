"""Real arguments for the inputs of a captured step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from graphopt.analysis.hints import empty_at_hint
from graphopt.graph import Graph, value_of
from graphopt.plan import Role, Slot


def step_arguments(
    graph: Graph, inputs: Sequence[Tensor], tangent: Callable[[Slot, Tensor], Tensor | None]
) -> list[Tensor]:
    """One tensor per input of a graph.

    Args:
        graph: as captured, maybe rewritten.
        inputs: one per input that is no tangent, in order.
        tangent: the values of a tangent, by its slot and its fake tensor; ``None`` for zeros. They
            are given the strides that the graph was derived for.
    """
    given, found = iter(inputs), []
    for slot, node in zip(graph.signature.inputs, graph.inputs, strict=True):
        if slot.role is not Role.TANGENT:
            value = next(given)
            found.append(value.detach() if isinstance(value, Tensor) else value)
            continue
        fake = value_of(node)
        real = empty_at_hint(fake)
        values = tangent(slot, fake)
        found.append(real.zero_() if values is None else real.copy_(values.detach()))
    return found
