"""A matrix whose blocks are owned by the ranks of a process group: products and systems."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import ArgumentError, RankError
from graphopt.hierarchical.arithmetic.factorization import (
    Factorization,
    checked_right_side,
    refined,
)
from graphopt.hierarchical.arithmetic.magnitudes import length, magnitude
from graphopt.hierarchical.arithmetic.operands import operand
from graphopt.hierarchical.arithmetic.parts import any_tensor, apply
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, placed
from graphopt.hierarchical.bounded import Bounded
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.rounding import gamma

_DOUBLE = torch.float64


@dataclass(frozen=True, eq=False)
class Distributed:
    """The sum over ranks of what each of them has. Made by `of`, on all ranks of the group.

    Attributes:
        own: the blocks of this rank, with zeros of rank 0 in place of all others.
        idle: whether this rank has no block.
        rows: clusters of rows.
        columns: clusters of columns.
        bound: as that of `HMatrix`, of the whole.
        confidence: as that of `HMatrix`.
        magnitude: of the whole, see `magnitudes.magnitude`.
        length: of the whole, see `magnitudes.length`, with the sum over ranks.
        group: the process group; None for the default one.
    """

    own: Block
    idle: bool
    rows: ClusterTree
    columns: ClusterTree
    bound: float
    confidence: float
    magnitude: float
    length: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, matrix: HMatrix, group: dist.ProcessGroup | None = None) -> Distributed:
        """Keep what this rank owns; nothing refers to the other blocks afterwards.

        Args:
            matrix: the same on all ranks.
            group: the ranks that take part; None for all.

        Raises:
            RankError: ranks have different matrices.
            ArgumentError: a matrix that is not float32 or float64, or not finite.
        """
        plain = operand(matrix, "the matrix")
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        _check_equal(plain, group)
        owner = owners(plain.root, world)
        return cls(
            own=_kept(plain.root, iter(owner), rank),
            idle=rank not in owner,
            rows=plain.rows,
            columns=plain.columns,
            bound=plain.bound,
            confidence=plain.confidence,
            magnitude=magnitude(plain.root),
            length=length(plain.root) + world,
            group=group,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), len(self.columns)

    @property
    def nbytes(self) -> int:
        """Of the blocks of this rank."""
        tensors = [t for p in placed(self.own) for t in vars(p.block).values() if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @torch.no_grad()
    def apply(self, x: Tensor) -> Bounded[Tensor]:
        """The matrix times x, on all ranks, by one all-reduce.

        Args:
            x: [n] or [n, c] in the original order, the same on all ranks, float32 or float64, in
                which the product is computed.

        Returns:
            The product, equal on all ranks, and a bound of the Euclidean norm of the error of each
            column, against the matrix that this one stands for.

        Raises:
            ArgumentError: another shape or dtype, or x is not finite.
        """
        right = self.columns.to_positions(checked_right_side(x, self.shape[1]))
        found = self.rows.to_original(self._product(right)).reshape(-1, *x.shape[1:])
        size = float(torch.linalg.vector_norm(right.double(), dim=0).max()) if x.numel() else 0.0
        lost = gamma(self.length, right.dtype) * self.magnitude
        if right.dtype == torch.float32:  # The blocks are rounded to it, too.
            lost += gamma(2, right.dtype) * self.magnitude
        return Bounded(found, (self.bound + lost) * size)

    def solve(
        self, b: Tensor, factorization: Factorization | None, refinements: int = 20
    ) -> Bounded[Tensor]:
        """``x`` with ``A x = b``: residuals by all ranks, corrected by factors that one rank has.

        The factors may be loose. Each correction makes the error smaller by their distance to the
        matrix, `Factorization.distance`, and they end where none helps any more.

        Args:
            b: [n] or [n, c] in the original order; that of the first rank counts.
            factorization: of a matrix that stands for the same as this one, on the first rank of
                the group; that of other ranks is not looked at.
            refinements: the most corrections.

        Returns:
            The solution, equal on all ranks, and a bound of the Euclidean norm of the error of each
            column; see `Factorization.solve`.

        Raises:
            ArgumentError: a right-hand side or factors that do not fit.
            RankError: those of another rank do not.
        """
        first = dist.get_rank(self.group) == 0
        right = self._agreed(b, factorization, first)
        self._announce(right)

        def inverse(x: Tensor) -> Tensor:
            found = torch.empty_like(x)
            if factorization is not None and first:
                found = factorization.solve_positions(x).contiguous()
            self._announce(found)
            return found

        found = refined(self._product, inverse, right, refinements)
        errors = torch.zeros(right.shape[1], dtype=_DOUBLE, device=right.device)
        if factorization is not None and first:
            sizes, sides = (torch.linalg.vector_norm(v.double(), dim=0) for v in (found.x, right))
            lost = self.bound + gamma(self.length, _DOUBLE) * self.magnitude
            lost = lost * sizes + gamma(2, _DOUBLE) * sides
            errors = factorization.error_bound(found.correction, lost).contiguous()
        self._announce(errors)
        x = self.columns.to_original(found.x).reshape(b.shape)
        return Bounded(x, float(errors.max()) if errors.numel() else 0.0)

    def _product(self, x: Tensor) -> Tensor:
        """In the order of positions and in the dtype of x: [n, c]."""
        found = x.new_zeros(self.shape[0], x.shape[1]) if self.idle else apply(self.own, x)
        dist.all_reduce(found, group=self.group)
        return found

    def _announce(self, values: Tensor) -> None:
        """What the first rank has, to all."""
        dist.broadcast(values, group=self.group, group_src=0)

    def _agreed(self, b: Tensor, factorization: Factorization | None, first: bool) -> Tensor:
        """[n, c] in the order of positions; if a rank refuses, all do, and none waits for it."""
        right, problem = torch.empty(0), None
        try:
            right = self.rows.to_positions(checked_right_side(b, self.shape[0])).contiguous()
            if first and (factorization is None or factorization.matrix.shape != self.shape):
                raise ArgumentError(
                    f"the first rank has no factors of a matrix of {self.shape}",
                    hint="pass it those of lu or cholesky of the same matrix",
                )
        except ArgumentError as error:
            problem = error
        refused = torch.tensor(float(problem is not None), device=any_tensor(self.own).device)
        dist.all_reduce(refused, group=self.group)
        if problem is not None:
            raise problem
        if refused:
            raise RankError("another rank refused its arguments", hint="see its error")
        return right


def owners(block: Block, world: int) -> list[int]:
    """Which rank has each block that is no grid, in the order of `placed`.

    The largest is given to the rank that has least, until none is left (longest processing time
    first; R. L. Graham, 1969, at most 4/3 of the best for the largest share).
    """
    costs = [_entries(place.block) for place in placed(block)]
    loads = [(0, rank) for rank in range(world)]
    found = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        found[number] = rank
        heapq.heappush(loads, (load + costs[number], rank))
    return found


def _entries(block: Dense | LowRank) -> int:
    if isinstance(block, Dense):
        return block.values.numel()
    return block.left.numel() + block.right.numel()


def _kept(block: Block, owner: Iterator[int], rank: int) -> Block:
    """Copies of the own blocks, so that the memory of the others can be freed."""
    if isinstance(block, Grid):
        return Grid(tuple(tuple(_kept(b, owner, rank) for b in line) for line in block.blocks))
    if next(owner) != rank:
        some, (m, n) = any_tensor(block), block.shape
        return LowRank(some.new_zeros(m, 0), some.new_zeros(n, 0))
    if isinstance(block, Dense):
        return Dense(block.values.clone())
    return LowRank(block.left.clone(), block.right.clone())


def _check_equal(matrix: HMatrix, group: dist.ProcessGroup | None) -> None:
    """One message that all ranks of one matrix send alike."""
    blocks = list(placed(matrix.root))
    weights = torch.arange(1, len(matrix.rows) + 1, dtype=torch.float64)
    mine = [
        *map(float, matrix.shape),
        float(len(blocks)),
        float(sum(_entries(place.block) for place in blocks)),
        float((matrix.rows.order.double() * weights).sum()),
        math.log1p(magnitude(matrix.root)),
    ]
    own = torch.tensor(mine, dtype=_DOUBLE, device=any_tensor(matrix.root).device)
    all_of_them = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, own, group=group)
    for rank, other in enumerate(all_of_them):
        if not torch.allclose(other, all_of_them[0], rtol=1e-6):
            raise RankError(
                f"rank {rank} has another matrix than the first rank",
                hint="make the same matrix on all ranks, from the same points and options",
            )
