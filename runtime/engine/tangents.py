"""What comes into a backward: tangents in the geometry that it was traced for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


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
