"""The loss of a micro-batch, its tangents, and whether micro-batches add up to the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphopt.errors import ArgumentError

Loss = Callable[[Any, Any], Any]

MEAN, SUM = "mean", "sum"
# Two orders of summation differ by less, and a loss of another kind by more.
_CLOSE = 1e-3


def loss_of(loss: Loss | None, output: Any, target: Any) -> Tensor:
    """The loss of a micro-batch.

    Raises:
        ArgumentError: it is no tensor with one element.
    """
    if loss is not None:
        found = loss(output, target)
    elif isinstance(output, Mapping):
        found = output.get("loss")
    else:
        found = getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(
            f"the loss has {what} and is not one number",
            where="loss" if loss is not None else "the model's output",
            hint="optimize(..., loss=torch.nn.functional.cross_entropy), or return the loss from "
            "the model",
        )
    return found


def tangents_of(loss: Tensor, leaves: Mapping[str, Tensor], factor: float) -> dict[str, Any]:
    """Gradients of ``factor * loss`` with regard to outputs of the graph, by name.

    Raises:
        ArgumentError: the loss does not depend on them.
    """
    _check_differentiable(loss)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    with torch._C._DisableAutocast():
        scale = torch.full_like(loss, factor)
        found = torch.autograd.grad(loss, list(wanted.values()), scale, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _check_differentiable(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ArgumentError(
            "the loss does not depend on what the model computes",
            where="loss",
            hint="compute it from the output, without detach() or item()",
        )


def reduction_of(
    loss: Loss | None,
    outputs: Sequence[Any],
    targets: Sequence[Any],
    target: Any,
    *,
    made_up: bool = True,
) -> str:
    """How the losses of micro-batches make the loss of their batch.

    Args:
        loss: of an output and a target; ``None`` where the output is, or has, the loss, which
            counts as a mean.
        outputs: any values of the form of the model's output, per micro-batch; those that a
            gradient may be asked of require one.
        targets: per micro-batch.
        target: of the whole batch.
        made_up: whether no parameter has been used for the outputs, so that none may be for
            the loss.

    Returns:
        ``"mean"``, weighted by examples, or ``"sum"``.

    Raises:
        ArgumentError: neither: the loss needs the whole batch; or it is not one number, or does
            not depend on the outputs.
    """
    try:
        with torch.enable_grad():
            first = loss_of(loss, outputs[0], targets[0])
            _check_differentiable(first)
            if made_up:
                _check_reads_outputs_only(first)
        if loss is None:
            return MEAN
        with torch.no_grad():
            found = _rule(loss, outputs, targets, target)
            # Micro-batches may be alike by chance; sorted by their targets they hardly are.
            sizes = [_examples(t) for t in targets]
            uneven = _sorted(target, sum(sizes))
            pieces = [_piece(uneven, sum(sizes[:i]), n, sum(sizes)) for i, n in enumerate(sizes)]
            _rule(loss, outputs, pieces, uneven, only=found)
    except ArgumentError:
        raise
    except Exception:  # many losses take some values only
        return MEAN
    return found


def _rule(
    loss: Loss, outputs: Sequence[Any], targets: Sequence[Any], target: Any, only: str = ""
) -> str:
    parts = [float(loss_of(loss, o, t)) for o, t in zip(outputs, targets, strict=True)]
    whole = float(loss_of(loss, joined(outputs), target))
    sizes = [_examples(t) for t in targets]
    mean = sum(p * n for p, n in zip(parts, sizes, strict=True)) / sum(sizes)
    for name, value in ((MEAN, mean), (SUM, sum(parts))):
        close = abs(value - whole) <= _CLOSE * max(abs(whole), abs(value))
        if name == (only or name) and (close or (value != value and whole != whole)):
            return name
    raise ArgumentError(
        f"the loss of a batch may be {whole:.4g} where its micro-batches have a mean of "
        f"{mean:.4g} and a sum of {sum(parts):.4g}, so it needs the whole batch at once",
        where="loss",
        hint="use a loss that is a mean or a sum over examples (without ignored or weighted ones, "
        "or with reduction='sum'), or microbatches=1",
    )


def _sorted(target: Any, examples: int) -> Any:
    """A target with its examples in the order of their values."""
    leaves, form = tree_flatten(target)
    rows = [v for v in leaves if isinstance(v, Tensor) and v.dim() and v.shape[0] == examples]
    order = rows[0].reshape(examples, -1).double().mean(1).argsort()
    found = (v[order] if any(v is row for row in rows) else v for v in leaves)
    return tree_unflatten(list(found), form)


def _piece(target: Any, start: int, count: int, examples: int) -> Any:
    leaves, form = tree_flatten(target)
    found = (
        v[start : start + count]
        if isinstance(v, Tensor) and v.dim() and v.shape[0] == examples
        else v
        for v in leaves
    )
    return tree_unflatten(list(found), form)


def _check_reads_outputs_only(loss: Tensor) -> None:
    """Whether no parameter is read beside the outputs: its gradient would be lost."""
    queue: list[Any] = [loss.grad_fn]
    seen = set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            raise ArgumentError(
                f"the loss reads a parameter of shape {list(variable.shape)} itself, whose "
                "gradient would be lost",
                where="loss",
                hint="compute such a penalty in the model's forward and return the loss there, or "
                "use the optimizer's weight_decay; a loss with parameters belongs into the model",
            )
        queue.extend(parent for parent, _ in node.next_functions)


def joined(outputs: Sequence[Any]) -> Any:
    """Outputs of micro-batches as that of their batch."""
    leaves = [tree_flatten(o)[0] for o in outputs]
    form = tree_flatten(outputs[0])[1]
    return tree_unflatten([_joined(values) for values in zip(*leaves, strict=True)], form)


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        found = {n: joined([getattr(value, n) for value in values]) for n in names}
        return dataclasses.replace(first, **found)
    if first is None or isinstance(first, (str, bool, int, float)):
        return first
    return torch.cat(list(values)) if values[0].dim() else torch.stack(list(values)).mean()


def _examples(target: Any) -> int:
    tensors = [t for t in tree_flatten(target)[0] if isinstance(t, Tensor) and t.dim()]
    return int(tensors[0].shape[0])
