"""Which blocks of a matrix over two cluster trees are of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.clusters import ClusterTree


@dataclass(frozen=True, eq=False)
class Pairs:
    """Blocks whose rows are clusters of one level, and whose columns are clusters of one level.

    Attributes:
        row_level: of the tree of rows.
        column_level: of the tree of columns.
        rows: [b] which clusters.
        columns: [b] which clusters.
    """

    row_level: int
    column_level: int
    rows: Tensor
    columns: Tensor

    def __len__(self) -> int:
        return self.rows.numel()

    def only(self, mask: Tensor | slice) -> Pairs:
        """Those of a mask [b], of indices or of a slice."""
        return Pairs(self.row_level, self.column_level, self.rows[mask], self.columns[mask])


class Admissibility(Protocol):
    """A rule that says of pairs of clusters whether their block is of low rank."""

    def __call__(self, rows: ClusterTree, columns: ClusterTree, pairs: Pairs) -> Tensor:
        """[b] booleans."""
        ...


@dataclass(frozen=True)
class Weak:
    """Every block beside the diagonal (HODLR)."""

    def __call__(self, rows: ClusterTree, columns: ClusterTree, pairs: Pairs) -> Tensor:
        """See `Admissibility`."""
        return pairs.rows != pairs.columns


@dataclass(frozen=True)
class Strong:
    """Clusters that are far from each other for their size.

    Attributes:
        eta: the diameter is at most so many times the distance of the bounding boxes.
        diameter: of the smaller cluster (``min``) or of the larger one (``max``).
    """

    eta: float = 1.0
    diameter: Literal["min", "max"] = "max"

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ArgumentError(f"eta={self.eta} separates nothing", hint="pass 1.0")

    def __call__(self, rows: ClusterTree, columns: ClusterTree, pairs: Pairs) -> Tensor:
        """See `Admissibility`."""
        low, high = (b[pairs.rows] for b in rows.boxes[pairs.row_level])
        other_low, other_high = (b[pairs.columns] for b in columns.boxes[pairs.column_level])
        gap = torch.maximum(low - other_high, other_low - high).clamp(min=0)
        distance, own, other = (v.norm(dim=1) for v in (gap, high - low, other_high - other_low))
        size = torch.minimum(own, other) if self.diameter == "min" else torch.maximum(own, other)
        found: Tensor = (size <= self.eta * distance) & (distance > 0)
        return found


@dataclass(frozen=True)
class Flat:
    """Tiles of the size of leaves, all but those on the diagonal (BLR).

    Attributes:
        level: of the tiles; None for that of the leaves.
    """

    level: int | None = None

    def __call__(self, rows: ClusterTree, columns: ClusterTree, pairs: Pairs) -> Tensor:
        """See `Admissibility`."""
        last = max(rows.depth, columns.depth) if self.level is None else self.level
        if max(pairs.row_level, pairs.column_level) < last:
            return torch.zeros(len(pairs), dtype=torch.bool)
        return pairs.rows != pairs.columns


@dataclass(frozen=True, eq=False)
class Partition:
    """The blocks that cover a matrix.

    Attributes:
        rows: clusters of rows.
        columns: clusters of columns.
        far: those of low rank, level by level.
        near: the others, of leaves.
        symmetric: only blocks with row <= column are listed; the others are their transposes.
    """

    rows: ClusterTree
    columns: ClusterTree
    far: tuple[Pairs, ...]
    near: Pairs
    symmetric: bool


def partition(
    rows: ClusterTree, columns: ClusterTree, rule: Admissibility, symmetric: bool = False
) -> Partition:
    """The largest admissible blocks, and leaves with leaves where none is.

    Args:
        rows: clusters of rows.
        columns: clusters of columns.
        rule: for instance `Weak`, `Strong` or `Flat`.
        symmetric: both trees are one, and only the upper half is wanted.
    """
    if symmetric and rows is not columns:
        raise ArgumentError(
            "a symmetric matrix over two trees", hint="pass one tree, or symmetric=False"
        )
    far, pairs = [], first()
    while True:
        admissible = rule(rows, columns, pairs)
        far.append(pairs.only(admissible))
        pairs = pairs.only(~admissible)
        finer = refined(rows, columns, pairs, symmetric)
        if finer is None:
            break
        pairs = finer
    return Partition(rows, columns, tuple(p for p in far if len(p)), pairs, symmetric)


def first() -> Pairs:
    """The whole matrix."""
    return Pairs(0, 0, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))


def refined(rows: ClusterTree, columns: ClusterTree, pairs: Pairs, symmetric: bool) -> Pairs | None:
    """The blocks of the children; None where both sides are leaves."""
    down = pairs.row_level < rows.depth, pairs.column_level < columns.depth
    if not any(down):
        return None
    own = _children(pairs.rows, down[0]).unsqueeze(2)
    other = _children(pairs.columns, down[1]).unsqueeze(1)
    shape = len(pairs), own.shape[1], other.shape[2]
    own, other = own.expand(shape).flatten(), other.expand(shape).flatten()
    found = Pairs(pairs.row_level + down[0], pairs.column_level + down[1], own, other)
    return found.only(own <= other) if symmetric else found


def _children(clusters: Tensor, down: bool) -> Tensor:
    """[b, 2], or [b, 1] the same where there are none."""
    if not down:
        return clusters.unsqueeze(1)
    return 2 * clusters.unsqueeze(1) + torch.arange(2)
