"""A graph as a plain function on values that differ from those of the user's batch.

`first_difference` compares two graphs on large values: a rewrite that is wrong for some values only
(a clamp in place of a ReLU) may be right on every value of one batch. `rounding_noise` tells how
far rounding alone moves each gradient: one that is zero in theory (a bias in front of a batch norm)
is nothing but rounding, and no two orders of summation agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.graph import Graph
from graphopt.model.trial import Trial, cotangent, same
from graphopt.plan import Role, Slot

# Inputs and vectors (scales and shifts of norms, biases) times this; matrices stay as they are, or
# deep models would overflow at once and everything would be NaN.
FACTOR = 64.0

_COMPARED = frozenset({Role.OUTPUT, Role.GRAD, Role.MUTATION})


def first_difference(before: Graph, after: Graph, inputs: Sequence[Tensor], trial: Trial) -> str:
    """What two graphs of one call compute differently on large values; ``""`` if nothing.

    Graphs that send messages, or take other inputs than the captured graph, are not run.

    Args:
        before: a graph; not changed.
        after: what a pass made of it; not changed.
        inputs: tensors of the captured call, one per input that is no tangent; not changed.
        trial: the call.
    """
    if before.signature.inputs != after.signature.inputs or _sends(after):
        return ""
    values = _values(before, inputs, _enlarged)
    reference, untrue_before = _run(before, values, trial)
    actual, untrue = _run(after, values, trial)
    if untrue and not untrue_before:  # torch itself records some wrongly
        return untrue
    for slot in sorted(reference.keys() | actual.keys(), key=str):
        left, right = reference.get(slot), actual.get(slot)
        if left is None or right is None or not same(left, right):
            return str(slot)
    return ""


def rounding_noise(graph: Graph, inputs: Sequence[Tensor], trial: Trial) -> dict[str, float]:
    """Largest change of each gradient and buffer when all inputs change by their last digit.

    Args:
        graph: as it was captured; not changed.
        inputs: tensors of the captured call, one per input that is no tangent; not changed.
        trial: the call.

    Returns:
        Absolute changes by the names of `graphopt.model.trial.Observed`.
    """
    epsilon = _coarsest(graph)
    generator = torch.Generator().manual_seed(2)

    def nudged(slot: Slot, value: Tensor) -> Tensor:
        signs = torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1)
        return value * (1 + epsilon * signs.to(value))

    exact, _ = _run(graph, _values(graph, inputs, lambda slot, value: value), trial)
    moved, _ = _run(graph, _values(graph, inputs, nudged), trial)
    words = {Role.GRAD: "gradient of", Role.MUTATION: "buffer"}
    changes = ((s, (value - moved[s]).abs().double().max()) for s, value in exact.items())
    return {f"{words[s.role]} {s.name}": float(d) for s, d in changes if s.role in words}


def _coarsest(graph: Graph) -> float:
    """Relative spacing of the narrowest floating-point type that the graph computes in."""
    values = (node.meta.get("val") for node in graph.operators)
    kinds = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def _sends(graph: Graph) -> bool:
    return any(str(n.target).startswith("_c10d_functional") for n in graph.operators)


def _enlarged(slot: Slot, value: Tensor) -> Tensor:
    return value * FACTOR if slot.role is Role.INPUT or value.dim() < 2 else value


def _values(
    graph: Graph, inputs: Sequence[Tensor], change: Callable[[Slot, Tensor], Tensor]
) -> list[Tensor]:
    """Inputs of the graph: changed ones of the call, and the tangents of a trial."""
    given = iter(inputs)
    generator = torch.Generator().manual_seed(0)
    values = []
    for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True):
        if slot.role is Role.TANGENT:
            fake = node.meta["val"]
            real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="cpu")
            values.append(real.copy_(cotangent(real, generator)).to(fake.device))
            continue
        value = next(given).detach()
        values.append(change(slot, value) if value.is_floating_point() else value)
    return values


class _Watched(fx.Interpreter):
    """Notes the first node whose recorded value has not the form of the real one."""

    untrue = ""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        recorded = n.meta.get("val")
        if isinstance(recorded, Tensor) and isinstance(result, Tensor) and not self.untrue:
            alike = recorded.shape == result.shape and recorded.dtype == result.dtype
            self.untrue = "" if alike else f"the recorded form of node {n.name!r}"
        return result


def _run(graph: Graph, values: Sequence[Tensor], trial: Trial) -> tuple[dict[Slot, Tensor], str]:
    """Results by slot, and which node is not what it is recorded to be."""
    given = [value.clone() for value in values]  # in-place operators may write to them
    watched = _Watched(graph.module, graph=graph.fx)
    with torch.no_grad(), torch._C._DisableAutocast(), trial.same_random_numbers():
        results: Any = watched.run(*given)
    pairs = zip(graph.signature.outputs, results, strict=True)
    return {slot: value for slot, value in pairs if slot.role in _COMPARED}, watched.untrue
