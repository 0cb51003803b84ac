"""Calls in which a number that changes becomes a tensor, since torch would make a constant of it.

What depends on the value of the number, such as dropout of a share of zero, which draws no random
numbers, becomes a condition of the graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import _reduction, functional

import graphopt.ops  # noqa: F401  (the operators below)

ops = torch.ops.graphopt


def can_replace(user: fx.Node, number: fx.Node) -> bool:
    """Whether `replace_call` has a way to make a call take a tensor for this number.

    Asking makes conditions of the graph of what that depends on.
    """
    return _rewriter(user, number) is not None


def replace_call(user: fx.Node, number: fx.Node, tensor: fx.Node) -> None:
    """Make a call take a tensor for one of its numbers, in place.

    Args:
        user: a call of a torch-level graph, for which `can_replace` holds.
        number: an argument of it, with its symbol in ``meta["example_value"]``.
        tensor: the same number as a tensor without dimensions.
    """
    rewrite = _rewriter(user, number)
    assert rewrite is not None, user
    rewrite(tensor)


Rewrite = Callable[[fx.Node], object]


def _rewriter(user: fx.Node, number: fx.Node) -> Rewrite | None:
    rule = _METHODS.get(str(user.target)) if user.op == "call_method" else None
    if user.op == "call_function":
        rule = _FUNCTIONS.get(user.target)
    if rule is None:
        return None
    signature, find = rule
    try:
        bound = signature.bind(*user.args, **user.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    given = dict(bound.arguments)
    if [name for name, value in given.items() if value is number] not in _NUMBERS:
        return None
    rewrite: Rewrite | None = find(user, given, number.meta["example_value"])
    return rewrite


# What the numbers are called in the signatures below.
_NUMBERS = (["p"], ["exponent"], ["alpha"], ["weight"], ["beta"], ["delta"], ["label_smoothing"])


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def _floating(*nodes: Any) -> bool:
    values = [_value(node) for node in nodes]
    return all(isinstance(v, Tensor) and v.is_floating_point() for v in values)


def _alike(one: Any, other: Any) -> bool:
    """Whether nothing is broadcast or cast between two tensors."""
    if not _floating(one, other):
        return False
    left, right = _value(one), _value(other)
    return left.dtype == right.dtype and tuple(left.shape) == tuple(right.shape)


def _as(user: fx.Node, target: Any, *args: Any) -> Rewrite:
    """Make a call of another function, with the tensor as its last argument."""

    def rewrite(tensor: fx.Node) -> None:
        user.op, user.target = "call_function", target
        user.args, user.kwargs = (*args, tensor), {}

    return rewrite


def _casts(user: fx.Node) -> bool:
    """Whether autocast may cast the arguments of a call."""
    enter = torch.amp.autocast_mode._enter_autocast
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")) or any(
        node.target is enter for node in user.graph.nodes
    )


Given = dict[str, Any]


def _dropout(user: fx.Node, given: Given, p: Any) -> Rewrite | None:
    x = given["input"]
    if given["inplace"] or not _floating(x) or p < 0 or p > 1:
        return None

    def nothing(tensor: fx.Node) -> None:
        user.replace_all_uses_with(x)
        user.graph.erase_node(user)

    def rewrite(tensor: fx.Node) -> None:
        with user.graph.inserting_before(user):
            both = user.graph.call_function(ops.varied_dropout.default, (x, tensor))
        both.meta = {**user.meta, "example_value": (_value(user), _value(user))}
        user.op, user.target, user.args, user.kwargs = (
            "call_function",
            operator.getitem,
            (both, 0),
            {},
        )

    if not given["training"]:
        return nothing
    return None if p == 0 or p == 1 else rewrite


def _pow(user: fx.Node, given: Given, exponent: Any) -> Rewrite | None:
    x = given["input"]
    if not _floating(x) or _casts(user) or exponent == 0:
        return None
    return _as(user, ops.varied_pow.default, x)


def _add(user: fx.Node, given: Given, alpha: Any) -> Rewrite | None:
    x, other = given["input"], given["other"]
    return _as(user, ops.varied_add.default, x, other) if _alike(x, other) else None


def _lerp(user: fx.Node, given: Given, weight: Any) -> Rewrite | None:
    x, end = given["input"], given["end"]
    return _as(user, ops.varied_lerp.default, x, end) if _alike(x, end) else None


def _loss(target: Any) -> Callable[[fx.Node, Given, Any], Rewrite | None]:
    def find(user: fx.Node, given: Given, value: Any) -> Rewrite | None:
        x, wanted = given["input"], given["target"]
        plain = all(given.get(name) is None for name in ("size_average", "reduce", "weight"))
        if not plain or not _alike(x, wanted) or _casts(user) or value <= 0:
            return None
        return _as(user, target, x, wanted, _reduction.get_enum(given["reduction"]))

    return find


def smoothed_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, smoothing: Tensor
) -> Tensor:
    """Eager's operators of `torch.nn.functional.cross_entropy` for classes, without weights.

    Args:
        logits: ``[N, C, ...]``.
        target: ``[N, ...]``.
        ignore_index: of targets that do not count.
        reduction: of that function.
        smoothing: its ``label_smoothing``, which is not 0, without dimensions.
    """
    number: Any = smoothing.item()
    logs = torch.log_softmax(logits, 1)
    likely = functional.nll_loss(logs, target, ignore_index=ignore_index, reduction=reduction)
    ignored = target == ignore_index
    rest = (-logs.sum(1)).masked_fill(ignored, 0.0)
    if reduction != "none":
        rest = rest.sum()
    if reduction == "mean":
        rest = rest / (~ignored).sum()
    loss: Tensor = (1 - number) * likely + rest * (number / logits.shape[1])
    return loss


def _smoothing(user: fx.Node, given: Given, value: Any) -> Rewrite | None:
    logits, target = given["input"], given["target"]
    classes = _floating(logits) and not _floating(target)
    classes = classes and _value(logits).dim() == _value(target).dim() + 1
    plain = all(given[name] is None for name in ("weight", "size_average", "reduce"))
    if not classes or not plain or _casts(user) or value <= 0 or value > 1:
        return None
    rest = (given["ignore_index"], given["reduction"])
    return _as(user, smoothed_cross_entropy, logits, target, *rest)


def _signature(text: str) -> inspect.Signature:
    empty = inspect.Parameter.empty
    made = []
    for part in text.split():
        name, has, default = part.partition("=")
        value = {"1": 1, "True": True, "False": False}.get(default) if has else empty
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        made.append(inspect.Parameter(name, kind, default=value))
    return inspect.Signature(made)


_POW = (_signature("input exponent"), _pow)
_LERP = (_signature("input end weight"), _lerp)
_ADD = (_signature("input other alpha=1"), _add)
_FUNCTIONS: dict[Any, tuple[inspect.Signature, Callable[..., Rewrite | None]]] = {
    operator.pow: _POW,
    torch.pow: _POW,
    torch.lerp: _LERP,
    torch.add: _ADD,
    torch.dropout: (_signature("input p training inplace=False"), _dropout),
    functional.dropout: (inspect.signature(functional.dropout), _dropout),
    functional.cross_entropy: (inspect.signature(functional.cross_entropy), _smoothing),
    **{
        function: (inspect.signature(function), _loss(target))
        for function, target in (
            (functional.smooth_l1_loss, ops.varied_smooth_l1.default),
            (functional.huber_loss, ops.varied_huber.default),
        )
    },
}
_METHODS = {"pow": _POW, "__pow__": _POW, "lerp": _LERP, "add": _ADD}
