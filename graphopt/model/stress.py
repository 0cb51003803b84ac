"""A graph as a plain function on values that differ from those of the user's batch.

`first_difference` compares two graphs on large values: a rewrite that is wrong for some values only
(a clamp in place of a ReLU) may be right on every value of one batch. `rounding_noise` tells how
far rounding alone moves each gradient: one that is zero in theory (a bias in front of a batch norm)
is nothing but rounding, and no two orders of summation agree on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from graphopt.analysis.aliasing import storage
from graphopt.analysis.effects import writes
from graphopt.analysis.hints import empty_at_hint, hint, is_known
from graphopt.analysis.remade import remade_in_backward
from graphopt.graph import Graph
from graphopt.model.comparison import same
from graphopt.model.cotangents import cotangent_of, has_number
from graphopt.model.results import Filed, Marks, Results
from graphopt.model.trial import Trial
from graphopt.model.watched import Late, Watched, Widened, widened
from graphopt.ops.unrounded import unrounded
from graphopt.plan import Role, Slot

# Inputs and vectors (scales and shifts of norms, biases) times this; matrices stay as they are, or
# deep models would overflow at once and everything would be NaN.
FACTOR = 64.0

# How many times more than by a change of the inputs' last digits a gradient may move, where many
# values were rounded and not only the inputs.
NOISE = 64.0
# By how many last digits inputs are changed, draw by draw: where a value jumps (a ReLU at 0), many
# roundings on the way reach what one of an input does not.
STEPS = (1, 1, 4, 4, 16, 16, 64, 64)
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
    wanted, found = Marks(), Marks()
    try:
        untrue_before = _run(before, values, trial, wanted)
    except Exception:  # many operators refuse some values: a probability of 3, a singular matrix
        return ""
    try:
        untrue = _run(after, values, trial, found)
    except Exception as error:
        return f"whether it runs ({type(error).__name__})"
    if untrue and not untrue_before:  # torch itself records some wrongly
        return untrue
    if wanted.found is not None and found.found == wanted.found:
        return ""
    reference, actual = Filed(), Filed()
    _run(before, values, trial, reference)
    _run(after, values, trial, actual)
    for name in sorted(reference.keys() | actual.keys()):
        if not _alike(reference.get(name), actual.get(name)):
            return name
    return ""


def rounding_noise(
    graph: Graph,
    inputs: Sequence[Tensor],
    trial: Trial,
    state: Callable[[str], Tensor] = no_state,
    draws: int = 1,
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
        draws: how many times inputs are changed, by `STEPS`. A value may jump (a ReLU at 0, the
            largest of several), and not every change makes it.

    Returns:
        Absolute differences by the names of `graphopt.model.comparison.Observed`, of numbers that
        are no floats the share that changes. Outputs are named by their position: ``"output 0"``.
        Empty where the graph does not run on changed values.
    """
    if _of_unknown_size(graph):
        return {}
    try:
        with trial.same_states():  # with a loss scale of 1, as cotangents are no loss's
            return _rounding_noise(graph, inputs, trial, state, draws)
    except Exception:
        return {}


def _rounding_noise(
    graph: Graph,
    inputs: Sequence[Tensor],
    trial: Trial,
    state: Callable[[str], Tensor],
    draws: int,
) -> dict[str, float]:
    epsilon = coarsest(graph)
    values = _values(graph, inputs, _same, state)
    exact = Filed()
    _run(graph, values, trial, exact)
    changes = _Changes(exact)
    if epsilon > SHORT or rounds(graph):
        _run(graph, values, trial, changes, Widened)
        factor = ROUNDINGS
    else:

        def nudged(draw: int, index: int, slot: Slot, value: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(2 + index + draw * 100_003)
            signs = torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1)
            return value * (1 + epsilon * STEPS[draw] * signs.to(value))

        for draw in range(draws):
            # What is smooth moves as many times as far; what jumps does not.
            changes.share = 1.0 / STEPS[draw]
            _run(graph, _values(graph, inputs, partial(nudged, draw), state), trial, changes)
        factor = NOISE
    found = {}
    for slot in graph.signature.outputs:
        change = changes.found.get(str(slot))
        if change is None:
            continue
        if slot.role is Role.MUTATION:
            found[f"buffer {slot.name}"] = found[f"parameter {slot.name}"] = change
        elif slot.role is Role.GRAD:
            found[f"gradient of {slot.name}"] = found[f"gradient of input {slot.name}"] = change
        else:
            found[f"output {slot.name}"] = change
    return {name: factor * change for name, change in found.items()}


class _Changes:
    """How far each result is from that of other runs, at most."""

    def __init__(self, exact: Filed) -> None:
        self._exact = exact
        self.found: dict[str, float] = {}
        self.share = 1.0  # of a change that counts

    def __setitem__(self, name: str, value: object) -> None:
        exact = self._exact[name]
        if isinstance(exact, Tensor) and isinstance(value, Tensor):
            change = self.share * _change(exact, value)
            self.found[name] = max(self.found.get(name, 0.0), change)


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


Change = Callable[[int, Slot, Tensor], Tensor]


def _enlarged(index: int, slot: Slot, value: Tensor) -> Tensor:
    return value * FACTOR if slot.role is Role.INPUT or value.dim() < 2 else value


def _same(index: int, slot: Slot, value: Tensor) -> Tensor:
    return value


def _values(
    graph: Graph,
    inputs: Sequence[Tensor],
    change: Change,
    state: Callable[[str], Tensor] = no_state,
) -> list[Any]:
    """Inputs of the graph: changed ones of the call, the tangents of a trial, and the state."""
    given = iter(inputs)
    tangents = itertools.count()
    pairs = zip(graph.inputs, graph.signature.inputs, strict=True)
    number = has_number(node.meta["val"] for node, slot in pairs if slot.role is Role.TANGENT)
    values: list[Any] = []
    for i, (node, slot) in enumerate(zip(graph.inputs, graph.signature.inputs, strict=True)):
        if slot.role is Role.TANGENT:
            values.append(Late(partial(_tangent, next(tangents), node, number)))
            continue
        if slot.role is Role.STATE:
            values.append(state(slot.name).clone())
            continue
        value: Any = next(given)
        if isinstance(value, Tensor):
            value = value.detach()
            if value.is_floating_point():
                value = Late(partial(change, i, slot, value))
        values.append(value)
    return values


def _run(
    graph: Graph,
    values: Sequence[Tensor | Late],
    trial: Trial,
    results: Results,
    kind: type[Watched] = Watched,
) -> str:
    """Hand over the results that count, by slot; returns which node is not as it is recorded."""
    written = _written(graph)

    def given(i: int, value: Any) -> Any:
        if isinstance(value, Late):
            late = Late(lambda: given(-1, value.make()))
            return late.make() if i in written else late
        value = tree_map_only(Tensor, widened, value) if kind is not Watched else value
        return value.clone() if i in written and isinstance(value, Tensor) else value

    slots = list(map(str, graph.signature.outputs))
    counts = [slot.role in _COMPARED for slot in graph.signature.outputs]

    def take(i: int, value: Any) -> None:
        if counts[i]:
            results[slots[i]] = value

    # As the backward of what runs does, see `graphopt.runtime.engine.copies`.
    watched = kind(graph.module, remade_in_backward(graph.fx), take)
    with torch.no_grad(), torch._C._DisableAutocast(), trial.same_random_numbers():
        watched.run(*(given(i, value) for i, value in enumerate(values)))
    return watched.untrue


def _tangent(index: int, node: fx.Node, number: bool) -> Tensor:
    fake = node.meta["val"]
    form = empty_at_hint(fake, "meta")
    like = torch.empty((), dtype=form.dtype).expand(form.shape)
    made = cotangent_of(index, like, beside_number=number)
    if not all(user.target is torch.ops.aten.add.Tensor for user in node.users):
        exact = made.stride() == form.stride()
        made = (
            made
            if exact
            else torch.empty_strided(form.shape, form.stride(), dtype=form.dtype).copy_(made)
        )
    return made.to(fake.device)


def _written(graph: Graph) -> set[int]:
    """Positions of inputs that in-place operators of the graph may write to, through any view."""
    owner = graph.get(storage).owner
    written = {
        owner[used] for node in graph.operators if writes(node) for used in node.all_input_nodes
    }
    return {i for i, node in enumerate(graph.inputs) if owner[node] in written}
