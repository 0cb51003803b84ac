"""How the kernel of a convolution moves over its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import ArgumentError


@dataclass(frozen=True)
class Window:
    """How the kernel of a convolution moves; one entry per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
    ) -> Window:
        """From the arguments of a convolution, of which one entry may stand for all dimensions.

        Raises:
            ArgumentError: a list has neither one entry nor one per dimension of the kernel.
        """

        def full(values: Sequence[int]) -> tuple[int, ...]:
            if len(values) not in (1, len(kernel)):
                raise ArgumentError(
                    f"{list(values)} does not fit a kernel of shape {list(kernel)}",
                    hint="pass one entry per spatial dimension",
                )
            return tuple(values) * (len(kernel) if len(values) == 1 else 1)

        return cls(
            tuple(kernel),
            full(stride),
            full(padding),
            full(dilation),
            full(output_padding) if transposed else (0,) * len(kernel),
            transposed,
        )

    @property
    def step(self) -> tuple[int, ...]:
        """Distance of neighbouring patches on the plane that `plane` makes."""
        return (1,) * len(self.kernel) if self.transposed else self.stride

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance of the last kernel offset from the first."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    def outputs(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Number of output positions along each dimension, for inputs of that size."""
        sizes = zip(
            spatial, self.stride, self.padding, self.reach, self.output_padding, strict=True
        )
        if self.transposed:
            return tuple((size - 1) * s - 2 * p + r + o + 1 for size, s, p, r, o in sizes)
        return tuple((size + 2 * p - r - 1) // s + 1 for size, s, p, r, _ in sizes)

    def margins(self) -> tuple[tuple[int, int], ...]:
        """Zeros before and after the data along each dimension; negative where data is cut off."""
        if not self.transposed:
            return tuple((p, p) for p in self.padding)
        sizes = zip(self.padding, self.reach, self.output_padding, strict=True)
        # The plane is reversed, so that the output padding comes first.
        return tuple((r - p + o, r - p) for p, r, o in sizes)

    def plane(self, x: Tensor) -> Tensor:
        """The image [..., *spatial] on which the patches are ordinary windows, without margins.

        A transposed convolution is one of stride 1 with the reversed kernel, over its input with
        zeros in between. Reversing the image instead keeps the kernel in order; it also reverses
        the patches, whose order no moment depends on.
        """
        if not self.transposed:
            return x
        rank = len(self.kernel)
        x = x.flip(tuple(range(-rank, 0)))
        if set(self.stride) == {1}:
            return x
        spatial = zip(x.shape[-rank:], self.stride, strict=True)
        stuffed = x.new_zeros(*x.shape[:-rank], *((size - 1) * s + 1 for size, s in spatial))
        places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in self.stride))
        stuffed[places] = x
        return stuffed

    def padded(self, x: Tensor) -> Tensor:
        """`plane` with its margins."""
        return pad(self.plane(x), self.margins())

    def windows(self, plane: Tensor, outputs: Sequence[int]) -> Tensor:
        """The patches [..., *kernel, *outputs] as a view of a `padded` plane."""
        rank = len(self.kernel)
        strides = plane.stride()[-rank:]
        return plane.as_strided(
            [*plane.shape[:-rank], *self.kernel, *outputs],
            [
                *plane.stride()[:-rank],
                *(t * d for t, d in zip(strides, self.dilation, strict=True)),
                *(t * s for t, s in zip(strides, self.step, strict=True)),
            ],
        )


@dataclass(frozen=True)
class PatchArguments:
    """Which moment of which patches: what the patch operators take besides their input.

    Attributes:
        window: how the kernel moves.
        groups: groups of the convolution; each has its own moment.
        ones: whether a constant 1 ends each patch.
        pieces: number of equal diagonal blocks of each group.
        scale: factor of the sum over all images and output positions.
    """

    window: Window
    groups: int
    ones: bool
    pieces: int
    scale: float

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        transposed: bool,
        output_padding: Sequence[int],
        *rest: Any,
    ) -> PatchArguments:
        """From the arguments of ``graphopt::patch_moment``, in its order.

        A transposed convolution's patch holds, for each entry (c, k) of the weight, the input value
        that it is multiplied with at that output position.
        """
        window = Window.of(kernel, stride, padding, dilation, transposed, output_padding)
        return cls(window, groups, *rest)


def pad(x: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    """`x` with zeros before and after it along its last dimensions."""
    if all(margin == (0, 0) for margin in margins):
        return x
    return F.pad(x, [entry for margin in reversed(margins) for entry in margin])
