"""Products with the blocks of one level of ancestors, of those clusters alone that have any.

Near the root few clusters of a level lie where two halves meet: only these are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.group_kinds import Coupled, Tiles
from graphopt.hierarchical.groups import Group
from graphopt.hierarchical.packed import ancestors


@dataclass(frozen=True, eq=False)
class _Piece:
    """The blocks of a group that have their ancestor on a level.

    Attributes:
        part: which blocks.
        used: [u] their clusters; None for all.
        rows: [b] among those.
        columns: [b] among those.
    """

    part: slice
    used: Tensor | None
    rows: Tensor
    columns: Tensor


class LevelProducts:
    """Of matrices that have their blocks and bases in common.

    Args:
        groups: of dense blocks, or with bases of clusters; on equal levels of one tree.
        tree: of rows and columns.
        kinds: of each matrix, the values or cores of each group.
    """

    def __init__(
        self, groups: Sequence[Group], tree: ClusterTree, kinds: Sequence[Sequence[Tensor]]
    ) -> None:
        self._groups = groups
        self._tree = tree
        self._kinds = kinds
        self._pieces: dict[int, list[_Piece | None]] = {}

    def __call__(self, x: Tensor, level: int, kinds: Sequence[int]) -> list[Tensor]:
        """Of some of the matrices with [n, q]."""
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        totals = [torch.zeros_like(padded) for _ in kinds]
        for number, piece in enumerate(self._at(level)):
            if piece is None:
                continue
            group = self._groups[number]
            positions = self._tree.positions[group.pairs.row_level]
            where = _some(positions, piece.used)
            given = padded[where]
            basis = None
            if isinstance(group, Coupled):
                right = basis = _some(group.right, piece.used)
                if group.left is not group.right:
                    basis = _some(group.left, piece.used)
                given = right.mT @ given
            for kind, total in zip(kinds, totals, strict=True):
                found = self._blocks(group, piece, self._kinds[kind][number], given)
                found = found if basis is None else basis @ found
                total.index_add_(0, where.flatten(), found.flatten(0, 1))
        return [total[:-1] for total in totals]

    def _blocks(self, group: Group, piece: _Piece, values: Tensor, given: Tensor) -> Tensor:
        """[u, k, q] the sums of products of blocks."""
        total = given.new_zeros(given.shape[0], values.shape[1], given.shape[2])
        for own in group.chunks(piece.part, max(values.shape[1:]) * given.shape[2]):
            here = slice(own.start - piece.part.start, own.stop - piece.part.start)
            rows, columns, blocks = piece.rows[here], piece.columns[here], values[own]
            total.index_add_(0, rows, blocks @ given[columns])
            if group.mirrored:
                total.index_add_(0, columns, blocks.mT @ given[rows])
        return total

    def _at(self, level: int) -> list[_Piece | None]:
        if level not in self._pieces:
            self._pieces[level] = [self._piece(group, level) for group in self._groups]
        return self._pieces[level]

    def _piece(self, group: Group, level: int) -> _Piece | None:
        # Groups are sorted by it.
        have = (ancestors(group.pairs, self._tree.depth) == level).nonzero().flatten()
        if not have.numel():
            return None
        part = slice(int(have[0]), int(have[-1]) + 1)
        both = torch.stack([group.pairs.rows[part], group.pairs.columns[part]])
        used, found = both.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        if len(used) == 1 << group.pairs.row_level:
            return _Piece(part, None, both[0], both[1])
        return _Piece(part, used, found[0], found[1])


def values_of(group: Group) -> Tensor:
    """What the blocks of a group have of their own."""
    if isinstance(group, Coupled):
        return group.cores
    assert isinstance(group, Tiles)
    return group.values


def _some(values: Tensor, which: Tensor | None) -> Tensor:
    return values if which is None else values[which]
