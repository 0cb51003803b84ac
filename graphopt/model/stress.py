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
from torch.utils._pytree import tree_map, tree_map_only

from graphopt.analysis.aliasing import storage
from graphopt.analysis.effects import writes
from graphopt.analysis.hints import empty_at_hint, hint, hints, is_known
from graphopt.graph import Graph
from graphopt.model.comparison import marks, same
from graphopt.model.trial import Trial, cotangent
from graphopt.ops.unrounded import unrounded
from graphopt.plan import Role, Slot

# Inputs and vectors (scales and shifts of norms, biases) times this; matrices stay as they are, or
# deep models would overflow at once and everything would be NaN.
FACTOR = 64.0

# How many times more than by a change of the inputs' last digits a gradient may move, where many
# values were rounded and not only the inputs.
NOISE = 64.0
# Types with a relative spacing above this are short; two graphs that both round to one may be this
# many times further apart than one of them is from what it would be without rounding.
SHORT = 1e-4
ROUNDINGS = 8.0


def no_state(name: str) -> Tensor:
    """For graphs without state."""
    raise KeyError(name)


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
    # An index out of range would cost a GPU's process its device for good.
    elsewhere = any(isinstance(v, Tensor) and v.device.type != "cpu" for v in inputs)
    other = before.signature.inputs != after.signature.inputs
    if other or elsewhere or _sends(after) or _of_unknown_size(before):
        return ""
    values = _values(before, inputs, _enlarged)
    try:
        reference, untrue_before = _run(before, values, trial)
    except Exception:  # many operators refuse some values: a probability of 3, a singular matrix
        return ""
    # As long as bits agree, results of both graphs are never there at once.
    wanted = marks(reference)
    del reference
    try:
        actual, untrue = _run(after, values, trial)
    except Exception as error:
        return f"whether it runs ({type(error).__name__})"
    if untrue and not untrue_before:  # torch itself records some wrongly
        return untrue
    if wanted is not None and marks(actual) == wanted:
        return ""
    reference, _ = _run(before, values, trial)
    for slot in sorted(reference.keys() | actual.keys(), key=str):
        if not _alike(reference.get(slot), actual.get(slot)):
            return str(slot)
    return ""


def rounding_noise(
    graph: Graph,
    inputs: Sequence[Tensor],
    trial: Trial,
    state: Callable[[str], Tensor] = no_state,
) -> dict[str, float]:
    """How far each output, gradient and buffer may be off by rounding alone.

    In a short type (bfloat16, float16), and where operators round, it is what the graph's own
    rounding makes of it: how far it is from the same graph in float32. There a bound from changed
    inputs would hide real faults. In other types it is what a change of all inputs by their last
    digits makes of it.

    Args:
        graph: as it was captured, or as a pass has left it; not changed.
        inputs: tensors of the captured call, one per input that is no tangent; not changed.
        trial: the call.
        state: the tensor of a ``STATE`` input, by its name; not changed.

    Returns:
        Absolute differences by the names of `graphopt.model.comparison.Observed`, of numbers that
        are no floats the share that changes. Outputs are named by their position: ``"output 0"``.
        Empty where the graph does not run on changed values.
    """
    if _of_unknown_size(graph):
        return {}
    try:
        with trial.same_states():  # with a loss scale of 1, as cotangents are no loss's
            return _rounding_noise(graph, inputs, trial, state)
    except Exception:
        return {}


def _rounding_noise(
    graph: Graph, inputs: Sequence[Tensor], trial: Trial, state: Callable[[str], Tensor]
) -> dict[str, float]:
    epsilon = coarsest(graph)
    values = _values(graph, inputs, lambda slot, value: value, state)
    exact, _ = _run(graph, values, trial)
    if epsilon > SHORT or rounds(graph):
        other, _ = _run(graph, values, trial, _Widened)
        factor = ROUNDINGS
    else:
        generator = torch.Generator().manual_seed(2)

        def nudged(slot: Slot, value: Tensor) -> Tensor:
            signs = torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1)
            return value * (1 + epsilon * signs.to(value))

        other, _ = _run(graph, _values(graph, inputs, nudged, state), trial)
        factor = NOISE
    found = {}
    for slot, value in exact.items():
        if not isinstance(value, Tensor):
            continue
        change = _change(value, other[slot])
        if slot.role is Role.MUTATION:
            found[f"buffer {slot.name}"] = found[f"parameter {slot.name}"] = change
        elif slot.role is Role.GRAD:
            found[f"gradient of {slot.name}"] = found[f"gradient of input {slot.name}"] = change
        else:
            found[f"output {slot.name}"] = change
    return {name: factor * change for name, change in found.items()}


def _change(value: Tensor, other: Tensor) -> float:
    if value.layout is not torch.strided:
        value, other = value.to_dense(), other.to_dense()
    if value.numel() == 0:
        return 0.0
    if not (value.is_floating_point() or value.is_complex()):
        return float((value != other).double().mean())
    change = (value - other.to(value.dtype)).abs().double()
    return float(torch.where(change.isfinite(), change, 0.0).max())


def coarsest(graph: Graph) -> float:
    """Relative spacing of the narrowest floating-point type that the graph computes in."""
    values = (node.meta.get("val") for node in graph.operators)
    kinds = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def rounds(graph: Graph) -> bool:
    """Whether operators of the graph round within a type."""
    return any(unrounded(node.target) for node in graph.operators)


def _alike(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return same(left, right)
    return bool(left is not None and (left == right or (left != left and right != right)))


def _of_unknown_size(graph: Graph) -> bool:
    """Whether an input or tangent has a size that depends on data."""
    values = [node.meta["val"] for node in graph.inputs]
    return any(not is_known(v) if isinstance(v, Tensor) else hint(v) is None for v in values)


def _sends(graph: Graph) -> bool:
    return any(str(n.target).startswith("_c10d_functional") for n in graph.operators)


def _enlarged(slot: Slot, value: Tensor) -> Tensor:
    return value * FACTOR if slot.role is Role.INPUT or value.dim() < 2 else value


def _values(
    graph: Graph,
    inputs: Sequence[Tensor],
    change: Callable[[Slot, Tensor], Tensor],
    state: Callable[[str], Tensor] = no_state,
) -> list[Tensor]:
    """Inputs of the graph: changed ones of the call, the tangents of a trial, and the state."""
    given = iter(inputs)
    generator = torch.Generator().manual_seed(0)
    values = []
    for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True):
        if slot.role is Role.TANGENT:
            fake = node.meta["val"]
            real = empty_at_hint(fake, "cpu")
            values.append(real.copy_(cotangent(real, generator)).to(fake.device))
            continue
        if slot.role is Role.STATE:
            values.append(state(slot.name).clone())
            continue
        value = next(given)
        if isinstance(value, Tensor):
            value = value.detach()
            value = change(slot, value) if value.is_floating_point() else value
        values.append(value)
    return values


class _Watched(fx.Interpreter):
    """Notes the first node whose recorded value has not the form of the real one."""

    untrue = ""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        recorded = n.meta.get("val")
        if isinstance(recorded, Tensor) and isinstance(result, Tensor) and not self.untrue:
            shape = hints(recorded.shape)
            alike = shape == tuple(result.shape) and recorded.dtype == result.dtype
            known = shape is not None
            self.untrue = f"the recorded form of node {n.name!r}" if known and not alike else ""
        return result


class _Widened(_Watched):
    """Runs a graph in float32 where it computes in a shorter type, without what it rounds."""

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """In float32, but with the random numbers, and only the kernels, that there are."""
        if without := unrounded(target):
            return without(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
            try:
                wide = tree_map_only(torch.dtype, _wide, (args, kwargs))
                return tree_map_only(Tensor, _widened, target(*wide[0], **wide[1]))
            except (RuntimeError, NotImplementedError):
                pass  # a kernel that exists for short types only
        args, kwargs = tree_map(self._narrowed, (self._node.args, self._node.kwargs))
        return tree_map_only(Tensor, _widened, target(*args, **kwargs))

    def _narrowed(self, own: Any) -> Any:
        if not isinstance(own, fx.Node):
            return own
        value, recorded = self.env[own], own.meta.get("val")
        if isinstance(value, Tensor) and isinstance(recorded, Tensor):
            return value.to(recorded.dtype)
        return value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _widened(value: Tensor) -> Tensor:
    return value.to(_wide(value.dtype))


def _run(
    graph: Graph, values: Sequence[Tensor], trial: Trial, kind: type[_Watched] = _Watched
) -> tuple[dict[Slot, Any], str]:
    """Results by slot, and which node is not what it is recorded to be."""
    written = _written(graph)
    if kind is not _Watched:
        values = [tree_map_only(Tensor, _widened, value) for value in values]
    given = [
        v.clone() if i in written and isinstance(v, Tensor) else v for i, v in enumerate(values)
    ]
    watched = kind(graph.module, graph=graph.fx)
    with torch.no_grad(), torch._C._DisableAutocast(), trial.same_random_numbers():
        results: Any = watched.run(*given)
    pairs = zip(graph.signature.outputs, results, strict=True)
    return {slot: value for slot, value in pairs if slot.role in _COMPARED}, watched.untrue


def _written(graph: Graph) -> set[int]:
    """Positions of inputs that in-place operators of the graph may write to, through any view."""
    owner = graph.get(storage).owner
    written = {
        owner[used] for node in graph.operators if writes(node) for used in node.all_input_nodes
    }
    return {i for i, node in enumerate(graph.inputs) if owner[node] in written}
