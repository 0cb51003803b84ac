"""All blocks of a matrix in groups of equal shape, and what is computed with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.admissibility import Pairs, first, refined
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, placed
from graphopt.hierarchical.blocks import transposed as transposed_block
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.group_kinds import Factored, Tiles
from graphopt.hierarchical.groups import Collected, Gathered, Group, add_derivatives
from graphopt.hierarchical.rounding import unit

_Key = tuple[int, int, int, int]


class Packed:
    """Blocks in groups. Rows and columns are in the order of positions.

    A product is a few batched ones for each group: gather, multiply, add.

    Args:
        groups: the blocks; sorted here by the level of the lowest common ancestor of their row and
            column cluster where both trees are one.
        rows: clusters of rows.
        columns: clusters of columns.
        parameters: what the values of groups with a source are functions of.
        derivative_bounds: of the Frobenius norms of what the derivatives stored in `Stored` sources
            have wrong, where there are any.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rows: ClusterTree,
        columns: ClusterTree,
        parameters: tuple[Tensor, ...] = (),
        derivative_bounds: tuple[float, ...] = (),
    ) -> None:
        self.groups = tuple(groups)
        self.rows = rows
        self.columns = columns
        self.parameters = parameters
        self.derivative_bounds = derivative_bounds

    @property
    def dtype(self) -> torch.dtype:
        """Of all entries."""
        return self.groups[0].tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Of all entries."""
        return self.groups[0].tensors[0].device

    @property
    def nbytes(self) -> int:
        """Of all blocks; shared memory counts once."""
        tensors = [t.untyped_storage() for group in self.groups for t in group.tensors]
        return sum({memory.data_ptr(): memory.nbytes() for memory in tensors}.values())

    @property
    def trainable(self) -> bool:
        """Whether values of blocks themselves require a gradient."""
        return any(t.requires_grad for group in self.groups for t in group.tensors)

    def product(self, x: Tensor, level: int | None = None) -> Tensor:
        """The matrix times [n, q]; with a level only blocks whose ancestor is there.

        The lowest common ancestor of row and column cluster is meant. Levels above that of the
        leaves are those of off-diagonal blocks, the level of the leaves has the diagonal ones.
        """
        given, out = Gathered(self.columns, x), Collected(self.rows, x)
        for group, part in self._parts(level):
            group.add(part, given, out)
        return out.rows()

    def inner_gradient(self, w: Tensor, v: Tensor, level: int | None = None) -> list[Tensor]:
        """The derivatives of ``sum(w * product(v, level))`` by the parameters.

        Cores and dense blocks get the derivatives by their entries, and pieces of the kernel are
        evaluated again for theirs: memory does not grow with the number of blocks.

        Args:
            w: [m, k].
            v: [n, k].
            level: as in `product`.
        """
        total = [torch.zeros_like(p) for p in self.parameters]
        if not total:
            return total
        left, right = Gathered(self.rows, w.detach()), Gathered(self.columns, v.detach())
        for group, part in self._parts(level):
            if group.source is None:
                continue
            for own, weights in group.gradients(part, left, right):
                add_derivatives(total, self.parameters, group.source, own, weights)
        return total

    def level_norms(self, level: int) -> Tensor:
        """[2**level] squared Frobenius norms of the blocks with this ancestor, float64."""
        total = torch.zeros(2**level, dtype=torch.float64, device=self.device)
        for group, part in self._parts(level):
            node = group.places[0][part] >> (group.pairs.row_level - level)
            total.index_add_(0, node, group.squares[part] * (1 + group.mirrored))
        return total

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(torch.tensor([g.norm for g in self.groups], dtype=torch.float64).norm())

    @cached_property
    def rounding(self) -> float:
        """A bound of what rounding adds to a product with a vector of norm 1."""
        total = sum(group.rounding(self.dtype) for group in self.groups)
        sums = (len(self.groups) + 1) * unit(self.dtype) * sum(g.norm for g in self.groups)
        return total + sums

    def to(self, device: torch.device) -> Packed:
        """On a device; parameters stay where they are."""
        groups = [group.to(device) for group in self.groups]
        return Packed(groups, self.rows, self.columns, self.parameters)

    def transposed(self) -> Packed:
        """In the same memory."""
        groups = [group.transposed() for group in self.groups]
        return Packed(groups, self.columns, self.rows, self.parameters)

    def root(self) -> Block:
        """The tree of blocks; they are views."""
        found: dict[_Key, Block] = {}
        sizes = [(t[1:] - t[:-1]).tolist() for t in self.rows.starts]
        widths = [(t[1:] - t[:-1]).tolist() for t in self.columns.starts]
        for group in self.groups:
            level, other = group.pairs.row_level, group.pairs.column_level
            where = zip(group.pairs.rows.tolist(), group.pairs.columns.tolist(), strict=True)
            for number, (row, column) in enumerate(where):
                block = group.block(number, sizes[level][row], widths[other][column])
                found[level, row, other, column] = block
                if group.mirrored:
                    found[other, column, level, row] = transposed_block(block)
        return self._assembled(found, first())

    def _assembled(self, found: dict[_Key, Block], pair: Pairs) -> Block:
        key = (pair.row_level, int(pair.rows), pair.column_level, int(pair.columns))
        if key in found:
            return found[key]
        below = refined(self.rows, self.columns, pair, symmetric=False)
        if below is None:
            raise ArgumentError("blocks do not cover the matrix", hint="build it from a partition")
        ones = [below.only(torch.arange(len(below)) == i) for i in range(len(below))]
        blocks = [self._assembled(found, one) for one in ones]
        across = 2 if below.column_level > pair.column_level else 1
        lines = [tuple(blocks[i : i + across]) for i in range(0, len(blocks), across)]
        return Grid(tuple(lines))

    def _parts(self, level: int | None) -> Iterator[tuple[Group, slice]]:
        if level is None:
            for group in self.groups:
                yield group, slice(0, len(group.pairs))
            return
        for group, counts in zip(self.groups, self._ancestors, strict=True):
            if level + 1 < len(counts) and counts[level] < counts[level + 1]:
                yield group, slice(counts[level], counts[level + 1])

    @cached_property
    def _ancestors(self) -> list[list[int]]:
        """For each group, where the blocks of each level of ancestors start."""
        if self.rows is not self.columns:
            raise ArgumentError(
                "row and column clusters have no common ancestors", hint="use one tree for both"
            )
        found = []
        for group in self.groups:
            levels = ancestors(group.pairs, self.rows.depth)
            if bool((levels[1:] < levels[:-1]).any()):
                raise ArgumentError("blocks are not sorted", hint="make the group by `pack`")
            counts = levels.bincount(minlength=self.rows.depth + 1).cumsum(0)
            found.append([0, *counts.tolist()])
        return found


def ancestors(pairs: Pairs, depth: int) -> Tensor:
    """[b] the levels of the lowest clusters that contain both the rows and the columns."""
    down, across = depth - pairs.row_level, depth - pairs.column_level
    low = torch.minimum(pairs.rows << down, pairs.columns << across)
    high = torch.maximum(((pairs.rows + 1) << down) - 1, ((pairs.columns + 1) << across) - 1)
    differ = low ^ high
    # The number of bits, exactly: float64 has integers of this size.
    return depth - torch.frexp(differ.double()).exponent.long()


def sorted_by_ancestor(pairs: Pairs, rows: ClusterTree, columns: ClusterTree) -> Pairs:
    """In the order that groups of one tree have."""
    if rows is not columns or not len(pairs):
        return pairs
    return pairs.only(ancestors(pairs, rows.depth).argsort(stable=True))


def pack(root: Block, rows: ClusterTree, columns: ClusterTree) -> Packed:
    """Copies of all blocks, in groups; cores are multiplied into a basis."""
    row_of, column_of = _clusters(rows), _clusters(columns)
    collected = Blocks(rows, columns)
    for place in placed(root):
        height, width = place.block.shape
        try:
            row_level, row = row_of[place.row, height]
            column_level, column = column_of[place.column, width]
        except KeyError:
            raise ArgumentError(
                f"the block at {place.row}, {place.column} of {height} x {width} is not one of two "
                "clusters",
                hint="build grids over the children of clusters",
            ) from None
        if isinstance(place.block, Dense):
            collected.dense(row_level, row, column_level, column, place.block.values)
        else:
            factors = _without_core(place.block)
            collected.low_rank(row_level, row, column_level, column, *factors)
    return collected.packed()


class Blocks:
    """Collects blocks one by one and copies them into groups.

    Blocks of low rank are grouped by level, and by rank up to powers of two.
    """

    def __init__(self, rows: ClusterTree, columns: ClusterTree) -> None:
        self._rows = rows
        self._columns = columns
        self._dense: dict[tuple[int, int], list[tuple[int, int, Tensor]]] = {}
        self._low: dict[tuple[int, int, int], list[tuple[int, int, Tensor, Tensor]]] = {}

    def dense(self, row_level: int, row: int, column_level: int, column: int, v: Tensor) -> None:
        """Of two clusters, [m, n]."""
        self._dense.setdefault((row_level, column_level), []).append((row, column, v))

    def low_rank(
        self, row_level: int, row: int, column_level: int, column: int, left: Tensor, right: Tensor
    ) -> None:
        """Of two clusters, [m, k] and [n, k]."""
        # Rank 0 is kept as rank 1: every block has its place.
        bits = max(left.shape[1] - 1, 0).bit_length()
        found = self._low.setdefault((row_level, column_level, bits), [])
        found.append((row, column, left, right))

    def packed(self) -> Packed:
        """All of them."""
        rows, columns = self._rows, self._columns
        groups: list[Group] = []
        for (level, other, _), items in self._low.items():
            pairs, order = _pairs(level, other, [item[:2] for item in items], rows, columns)
            rank = max(1, *(item[2].shape[1] for item in items))
            left = _stacked([items[i][2] for i in order], rows.positions[level].shape[1], rank)
            right = _stacked([items[i][3] for i in order], columns.positions[other].shape[1], rank)
            groups.append(Factored(pairs, left, right))
        for (level, other), tiles in self._dense.items():
            pairs, order = _pairs(level, other, [tile[:2] for tile in tiles], rows, columns)
            shape = rows.positions[level].shape[1], columns.positions[other].shape[1]
            groups.append(Tiles(pairs, _stacked([tiles[i][2] for i in order], *shape)))
        return Packed(groups, rows, columns)


def _clusters(tree: ClusterTree) -> dict[tuple[int, int], tuple[int, int]]:
    """By first position and size: level and number."""
    return {(c.start, c.size): (c.level, c.index) for c in tree.clusters()}


def _pairs(
    level: int,
    other: int,
    where: list[tuple[int, int]],
    rows: ClusterTree,
    columns: ClusterTree,
) -> tuple[Pairs, list[int]]:
    found = Pairs(level, other, *torch.tensor(where).unbind(1))
    if rows is not columns:
        return found, list(range(len(where)))
    order = ancestors(found, rows.depth).argsort(stable=True)
    return Pairs(level, other, found.rows[order], found.columns[order]), order.tolist()


def _without_core(block: LowRank) -> tuple[Tensor, Tensor]:
    if block.core is None:
        return block.left, block.right
    if block.left.shape[1] >= block.right.shape[1]:
        return block.left @ block.core, block.right
    return block.left, block.right @ block.core.T


def _stacked(values: list[Tensor], rows: int, columns: int) -> Tensor:
    """[b, rows, columns], zero where a matrix has less."""
    pad = torch.nn.functional.pad
    return torch.stack([pad(v, (0, columns - v.shape[1], 0, rows - v.shape[0])) for v in values])
