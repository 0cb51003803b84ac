"""Kinds of calls: what two calls have in common that one answer holds for both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture.checkpoints import within_checkpoint
from graphopt.errors import GraphoptError
from graphopt.model.entries import PlainKind

# How many kinds of calls that run plain are remembered.
MAX_KINDS = 64

# After so many refusals in one mode, no call in that mode is tried any more.
MAX_REFUSALS = 8


@dataclass(frozen=True)
class Kind:
    """One kind of call.

    Attributes:
        mode: training, grad mode, autocast, and whether it is checkpointed.
        call: dtypes, devices, shapes, `requires_grad` of the tensors, and what else is given.
    """

    mode: Hashable
    call: Hashable


def kind_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kind:
    """The kind of this call; numbers count by their type only, as they may change at each step."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    mode = (
        model.training,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        within_checkpoint(),
        *(
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            for device in ("cpu", "cuda")
        ),
    )
    return Kind(mode, (str(spec), *map(_described, leaves)))


def _described(leaf: object) -> Hashable:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, str(leaf.device), leaf.layout, leaf.requires_grad)
    if leaf is None or isinstance(leaf, bool | str):
        return leaf
    return f"{type(leaf).__module__}.{type(leaf).__qualname__}"


class PlainKinds:
    """The kinds of calls of one model that run plain, and why; bounded.

    A reason with an empty kind of call holds for its whole mode.
    """

    def __init__(self) -> None:
        self._kinds: OrderedDict[Kind, PlainKind] = OrderedDict()
        self._refusals: dict[Hashable, int] = {}

    def __contains__(self, kind: Kind) -> bool:
        return bool(self._kinds) and (
            kind in self._kinds or self._refusals.get(kind.mode, 0) >= MAX_REFUSALS
        )

    def add(self, kind: Kind, signature: str, error: GraphoptError) -> PlainKind:
        """Remember that calls of this kind run plain."""
        self._refusals[kind.mode] = self._refusals.get(kind.mode, 0) + 1
        last = self._refusals[kind.mode] == MAX_REFUSALS
        entry = PlainKind(signature, error.message, error.where, error.hint, every_later=last)
        self._kinds[kind] = entry
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        return entry

    def entries(self) -> tuple[PlainKind, ...]:
        """What is remembered, oldest first."""
        return tuple(self._kinds.values())
