"""Block lower triangular operators, and systems with them.

A leaf of ``L`` holds its permutation too: ``P A = L U`` makes ``P.T L`` the lower factor, which is
no triangle any more but is as easily solved with. So pivoting in leaves needs no care elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from graphopt.hierarchical.arithmetic.magnitudes import (
    column_norms,
    length,
    magnitude,
    root_of_squares,
)
from graphopt.hierarchical.arithmetic.parts import (
    Span,
    apply,
    factors,
    recut,
)
from graphopt.hierarchical.arithmetic.pending import Pending, Product, fill, forming_error, settled
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, dense, transposed
from graphopt.hierarchical.rounding import gamma, norm


@dataclass(frozen=True, eq=False)
class Corner:
    """``P.T @ values``, where row i of ``P`` is row ``order[i]`` of the identity.

    Attributes:
        values: [m, m], lower triangular; entries above the diagonal are not read.
        order: [m]; None for the identity.
    """

    values: Tensor
    order: Tensor | None = None

    @property
    def size(self) -> int:
        """Rows."""
        return self.values.shape[0]

    @cached_property
    def magnitude(self) -> float:
        """The Frobenius norm."""
        return norm(self.values.tril())

    @property
    def length(self) -> int:
        """The most operations one after the other for an entry of a solution."""
        return self.size + 1

    def dense(self) -> Tensor:
        """[m, m] with all entries."""
        values = self.values.tril()
        return values if self.order is None else values[self.order.argsort()]

    def solve(self, b: Tensor, transpose: bool = False) -> Tensor:
        """``x`` with ``self @ x = b``, or with the transpose; b: [m, c] in its own dtype.

        The residual has a norm of at most ``gamma(length) * (magnitude |x| + |b|)``, here and for
        `Stairs`.
        """
        values = self.values.to(b.dtype)
        if not transpose and self.order is not None:
            b = b[self.order]
        matrix = values.T if transpose else values
        found: Tensor = torch.linalg.solve_triangular(matrix, b, upper=transpose)
        if not transpose or self.order is None:
            return found
        return torch.empty_like(found).index_copy_(0, self.order, found)


@dataclass(frozen=True, eq=False)
class Stairs:
    """Triangular operators on the diagonal, and blocks below it.

    Attributes:
        diagonal: one for each row of blocks.
        below: row i has i blocks.
    """

    diagonal: tuple[Triangle, ...]
    below: tuple[tuple[Block, ...], ...]

    @cached_property
    def size(self) -> int:
        """Rows."""
        return sum(inner.size for inner in self.diagonal)

    @cached_property
    def spans(self) -> list[Span]:
        """Where each row of blocks begins and ends."""
        return list(pairwise(accumulate((inner.size for inner in self.diagonal), initial=0)))

    @cached_property
    def magnitude(self) -> float:
        """At least the Frobenius norm of the absolute values."""
        own = [inner.magnitude for inner in self.diagonal]
        return math.hypot(*own, *(magnitude(block) for line in self.below for block in line))

    @cached_property
    def length(self) -> int:
        """The most operations one after the other for an entry of a solution."""
        own = max(inner.length for inner in self.diagonal)
        blocks = [length(block) for line in self.below for block in line]
        # With the transpose, columns take the place of rows.
        turned = [length(transposed(block)) for line in self.below for block in line]
        return max(own, *blocks, *turned) + len(self.diagonal)

    def dense(self) -> Tensor:
        """[m, m] with all entries; for tests."""
        found = self.diagonal[0].dense().new_zeros(self.size, self.size)
        for rows, inner, line in zip(self.spans, self.diagonal, self.below, strict=True):
            found[slice(*rows), slice(*rows)] = inner.dense()
            for columns, block in zip(self.spans, line, strict=False):
                found[slice(*rows), slice(*columns)] = dense(block)
        return found

    def solve(self, b: Tensor, transpose: bool = False) -> Tensor:
        """``x`` with ``self @ x = b``, or with the transpose; b: [m, c] in its own dtype."""
        found: dict[int, Tensor] = {}
        for i, before in _order(len(self.diagonal), transpose):
            own = b[slice(*self.spans[i])]
            for k in before:
                block = self.below[k][i] if transpose else self.below[i][k]
                own = own - apply(block, found[k], transpose)
            found[i] = self.diagonal[i].solve(own, transpose)
        return torch.cat([found[i] for i in range(len(self.diagonal))])


Triangle = Corner | Stairs


def corner(operator: Triangle) -> Corner:
    """The first leaf."""
    while isinstance(operator, Stairs):
        operator = operator.diagonal[0]
    return operator


def solve_block(
    operator: Triangle, target: Block, pending: Pending, tolerance: float, transpose: bool = False
) -> tuple[Block, float]:
    """``X`` with ``operator @ X = target + pending``, in the form of `target`.

    Args:
        operator: [m, m].
        target: [m, n].
        pending: for that shape.
        tolerance: how much each low-rank block of the right-hand side may lose, absolute.
        transpose: with the transposed operator.

    Returns:
        The solution, and a bound of the Frobenius norm of its residual.
    """
    if isinstance(target, Grid) and isinstance(operator, Corner) and len(target.blocks) > 1:
        target, error = fill(target, pending, tolerance)
        whole = Dense(dense(target))
        block, lost = _solved(operator, whole, forming_error(target), transpose)
        return block, error + lost
    if not isinstance(target, Grid):
        target, error = fill(target, pending, tolerance)
        return _solved(operator, target, error, transpose)
    pending, error = settled(pending)
    lines, errors = [], []
    if isinstance(operator, Corner):
        for columns, block in zip(target.column_spans, target.blocks[0], strict=True):
            own = pending.within((0, operator.size), columns)
            found, lost = solve_block(operator, block, own, tolerance, transpose)
            lines.append(found)
            errors.append(lost)
        return Grid((tuple(lines),)), error + root_of_squares(errors)
    across = target.column_spans
    target = recut(target, operator.spans, across)
    rows: dict[int, list[Block]] = {}
    for i, before in _order(len(operator.diagonal), transpose):
        rows[i] = []
        for j, columns in enumerate(across):
            own = pending.within(operator.spans[i], columns)
            for k in before:
                factor = transposed(operator.below[k][i]) if transpose else operator.below[i][k]
                own = own.plus(Product(factor, rows[k][j], -1.0))
            found, lost = solve_block(
                operator.diagonal[i], target.blocks[i][j], own, tolerance, transpose
            )
            rows[i].append(found)
            errors.append(lost)
    grid = Grid(tuple(tuple(rows[i]) for i in range(len(rows))))
    return grid, error + root_of_squares(errors)


# -- helpers ---------------------------------------------------------------------------------------


def _order(count: int, transpose: bool) -> list[tuple[int, range]]:
    """Rows of blocks in the order in which they are solved, and those before each."""
    if transpose:
        return [(i, range(i + 1, count)) for i in reversed(range(count))]
    return [(i, range(i)) for i in range(count)]


def _solved(
    operator: Triangle, target: Block, error: float, transpose: bool
) -> tuple[Block, float]:
    if isinstance(target, Dense):
        values = operator.solve(target.values, transpose)
        size = operator.magnitude * norm(values) + norm(target.values)
        return Dense(values), error + gamma(operator.length, values.dtype) * size
    assert isinstance(target, LowRank)
    left, right = factors(target)
    if not left.shape[1]:
        return LowRank(left, right), error
    values = operator.solve(left, transpose)
    sizes = operator.magnitude * column_norms(values) + column_norms(left)
    lost = gamma(operator.length, values.dtype) * float(sizes @ column_norms(right))
    return LowRank(values, right), error + lost
