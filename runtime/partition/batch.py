"""The micro-batches of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphopt.errors import ArgumentError


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        target: what the loss compares the output with; ``None`` where the model has its own loss.
        examples: how many it has.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    examples: int


def micro_batches(
    batch: Sequence[Any], kwargs: Mapping[str, Any], count: int, *, has_target: bool
) -> list[MicroBatch]:
    """Cut a batch along its first dimension, into parts whose sizes differ by one at most.

    All tensors with as many examples as the first one are cut; everything else, numbers and tensors
    of other sizes, is the same for all parts.

    Args:
        batch: positional arguments of the model, and the target behind them.
        kwargs: keyword arguments of the model.
        count: of micro-batches; of a batch with fewer examples, one each.
        has_target: whether the last of `batch` is a target.

    Raises:
        ArgumentError: there is no tensor, or no target, or the target cannot be cut, or a tensor
            requires a gradient.
    """
    if has_target and len(batch) < 2:
        raise ArgumentError(
            f"step was given {len(batch)} items, and needs inputs and a target",
            hint="model.step(inputs, target)",
        )
    leaves, form = tree_flatten((tuple(batch), dict(kwargs)))
    sized = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not sized or not sized[0].shape[0]:
        raise ArgumentError(
            "the batch has no tensor with examples along its first dimension",
            hint="model.step(inputs, target), with tensors of shape [examples, ...]",
        )
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise ArgumentError(
            "a tensor of the batch requires a gradient, and a step only gives those of parameters",
            hint="pass it with detach()",
        )
    examples = sized[0].shape[0]
    if has_target and not _cuts(batch[-1], examples):
        raise ArgumentError(
            f"the target has no tensor with {examples} examples along its first dimension, so it "
            "cannot be divided among micro-batches",
            hint="pass a target with one row per example; for a loss of a whole batch use "
            "microbatches=1",
        )
    parts = min(count, examples)
    cut = [
        torch.tensor_split(leaf, parts)
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == examples
        else [leaf] * parts
        for leaf in leaves
    ]
    found = []
    for number in range(parts):
        args, named = tree_unflatten([pieces[number] for pieces in cut], form)
        size = examples // parts + (number < examples % parts)
        target = args[-1] if has_target else None
        found.append(MicroBatch(args[:-1] if has_target else args, named, target, size))
    return found


def check_takes(model: nn.Module, micro: MicroBatch) -> None:
    """Whether a model with its own loss takes the items of a batch.

    Raises:
        ArgumentError: it does not; as a rule the last one is a target, and `loss` was forgotten.
    """
    try:
        inspect.signature(model.forward).bind(*micro.args, **micro.kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"step was given {len(micro.args)} items, and {type(model).__name__} does not take "
            f"them: {error}",
            where="step",
            hint="if the last item is a target: "
            "optimize(..., loss=torch.nn.functional.cross_entropy)",
        ) from None


def _cuts(value: Any, examples: int) -> bool:
    tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return any(t.dim() > 0 and t.shape[0] == examples for t in tensors)
