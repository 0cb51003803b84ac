"""What comes into a backward: tangents in the geometry that it was traced for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor

SMALL = 1024
"""Bytes of tangents that may as well stay until the backward is done."""


class Taken(list[Tensor | None]):
    """Tangents that whoever passes them on empties, so that they die with their last reader."""


def taken(tangents: tuple[Tensor | None, ...]) -> Taken:
    """The tangents of a node's backward, such that they can die before it is done.

    Autograd holds what it has given a node until the node returns, and one node is the whole model
    here: the gradient of all logits would stay to the end, which eager frees at once. Where nobody
    else has a tangent, a second tensor takes its memory over.
    """
    alone = _counts_alone()
    counts = _counts(tangents)
    return Taken(
        _moved(tangent) if count == alone and _can_move(tangent) else tangent
        for tangent, count in zip(tangents, counts, strict=True)
    )


def _can_move(tangent: Tensor | None) -> bool:
    return (
        type(tangent) is Tensor
        and tangent.layout is torch.strided
        and tangent.nbytes >= SMALL
        and not (tangent._is_view() or tangent.is_inference())
    )


def _moved(tangent: Tensor | None) -> Tensor:
    assert tangent is not None
    other = tangent.detach()
    cast("Any", tangent).set_()
    return other


def _counts(tangents: Sequence[Any]) -> list[tuple[int, int] | None]:
    """How often Python and C++ refer to each of them."""
    return [None if t is None else (sys.getrefcount(t), t._use_count()) for t in tangents]


@cache
def _counts_alone() -> tuple[int, int] | None:
    """What `_counts` finds where autograd alone has a tangent: asked of autograd itself."""
    found: list[tuple[int, int] | None] = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
            found.extend(_asked(tangents))
            return tangents[0]

    def _asked(tangents: tuple[Tensor | None, ...]) -> list[tuple[int, int] | None]:
        return _counts(tangents)

    with torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True)
        Node.apply(leaf).square().sum().backward()  # type: ignore[no-untyped-call]
    return found[0]


@dataclass(frozen=True)
class Expected:
    """Geometry that a tangent must have, because the backward graph was traced for it.

    Where a size is not known, it is the one of the output that the forward has given.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Expected:
        """The geometry of a (fake) tensor."""
        return cls(tuple(value.shape), value.stride(), value.dtype, value.device)

    @cached_property
    def known(self) -> bool:
        """Whether all sizes are those of every call."""
        return all(type(number) is int for number in (*self.size, *self.stride))

    def at(self, output: tuple[torch.Size, tuple[int, ...]]) -> Expected:
        """The geometry for an output of this size and these strides."""
        if self.known:
            return self
        size, stride = tuple(output[0]), output[1]
        if any(s == 0 and n > 1 for n, s in zip(size, stride, strict=True)):
            # No memory for so many different gradients: it was traced for a contiguous one.
            stride = torch.empty(size, device="meta").stride()
        return replace(self, size=size, stride=stride)

    def coerce(self, tangent: Tensor | None) -> Tensor:
        """The tangent in this geometry; zeros where there is none."""
        if tangent is None:
            tangent = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.size)
        if tangent.stride() == self.stride or self._fits(tangent):
            return tangent
        out = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return out.copy_(tangent)

    def _fits(self, tangent: Tensor) -> bool:
        """Equal strides wherever there is more than one element."""
        strides = zip(self.size, self.stride, tangent.stride(), strict=True)
        return all(a == b for size, a, b in strides if size != 1)
