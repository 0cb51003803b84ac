"""Which elements of a padded tensor belong to true positions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.data.collate import Side


@dataclass(frozen=True)
class Padded:
    """A dimension of positions that has grown by padding.

    Attributes:
        length: without padding.
        more: padded positions.
        side: where they are.
    """

    length: int
    more: int
    side: Side = "right"

    def readings(self, without: int, padded: int) -> Iterator[Tensor | None]:
        """Ways to find `without` true elements in a dimension of `padded`, most likely first.

        A dimension of as many elements is taken whole (``None``). One of the batch and the
        positions together (of which there are several ways), and one of fewer positions, such as
        those that a stride leaves, are told by how they grew.
        """
        if without == padded:
            yield None
            return
        if without > padded:
            return
        inside = slice(0, self.length) if self.side == "right" else slice(self.more, None)
        rows, rest = divmod(without, self.length)
        if not rest and padded == rows * (self.length + self.more):
            outer = [rows, *(a for a in range(1, rows) if rows % a == 0)]
            for a in outer:
                grid = torch.arange(padded).view(a, self.length + self.more, rows // a)
                yield grid[:, inside].reshape(-1)
            return
        every = torch.arange(padded)
        yield every[:without] if self.side == "right" else every[padded - without :]


@dataclass(frozen=True)
class Place:
    """Where the elements of a tensor are in the same tensor with padding.

    Attributes:
        indices: by dimension, those of true positions; ``None`` for all.
        error: of the elements there, relative to the largest magnitude without padding.
    """

    indices: tuple[Tensor | None, ...]
    error: float

    def spread(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of `shape` with these values at true positions and zeros at padded ones."""
        for dim, index in enumerate(self.indices):
            if index is not None:
                grown = [*values.shape[:dim], shape[dim], *values.shape[dim + 1 :]]
                index = index.to(values.device)
                values = values.new_zeros(grown).index_copy(dim, index, values)
        return values


def closest(without: Tensor, padded: Tensor, layout: Padded, least: float = 0.0) -> Place | None:
    """Where `without` is in `padded`; of several readings the one with the smallest difference.

    Args:
        without: computed without padding.
        padded: the same with it.
        layout: of the padding.
        least: what the difference is relative to at least.

    Returns:
        ``None`` if `padded` is no tensor that has grown by padding.
    """
    if without.dim() != padded.dim() or without.dtype != padded.dtype:
        return None
    sizes = zip(without.shape, padded.shape, strict=True)
    best: Place | None = None
    for indices in itertools.product(*(list(layout.readings(a, b)) for a, b in sizes)):
        part = padded
        for dim, index in enumerate(indices):
            part = part if index is None else part.index_select(dim, index.to(part.device))
        error = _error(without, part, least)
        if best is None or error < best.error:
            best = Place(indices, error)
        if not error:
            break
    return best


def _error(without: Tensor, padded: Tensor, least: float) -> float:
    """Largest difference relative to the largest magnitude; infinite if NaN or integers differ."""
    if torch.equal(without, padded):
        return 0.0
    if not (without.is_floating_point() or without.is_complex()):
        return float("inf")
    wide = torch.complex128 if without.is_complex() else torch.float64
    a, b = without.to(wide), padded.to(wide)
    alike = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(alike, 0.0, (a - b).abs()).max().item()
    scale = max(torch.where(a.isfinite(), a.abs(), 0.0).max().item(), least)
    error = difference / scale if scale > 0 else difference
    return error if error == error else float("inf")
