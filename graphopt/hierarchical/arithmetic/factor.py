"""LU and Cholesky factors of matrices in blocks, with a bound of the backward error.

Block by block from the left: every block of the factors is one block of the matrix, minus all
products that belong to it, truncated once, and then solved with the triangle beside or above it.
What truncation drops is therefore the backward error of this block and of no other one, so that
the squares add up: ``||A - L U||_F^2`` is at most the sum over blocks of what was measured.
Rounding is added by the constants of Higham, Accuracy and Stability of Numerical Algorithms,
sections 8.1, 9.3 and 10.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.arithmetic.magnitudes import root_of_squares
from graphopt.hierarchical.arithmetic.parts import LEAF, Span, common, halved, recut
from graphopt.hierarchical.arithmetic.pending import Pending, Product, fill, forming_error, settled
from graphopt.hierarchical.arithmetic.triangular import Corner, Stairs, Triangle, solve_block
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, dense, transposed
from graphopt.hierarchical.rounding import gamma


class LeafError(Exception):
    """A dense block on the diagonal has no factor.

    Args:
        rows: of the matrix, positions.
    """

    def __init__(self, rows: Span) -> None:
        super().__init__(rows)
        self.rows = rows


@dataclass(frozen=True, eq=False)
class Factors:
    """``lower @ upper.T``, for Cholesky with the same operator twice.

    Attributes:
        lower: with the permutations of the leaves.
        upper: the transposed upper factor.
        error: a bound of the Frobenius norm of the difference to what was factored.
    """

    lower: Triangle
    upper: Triangle
    error: float


def factored(block: Block, tolerance: float, symmetric: bool) -> Factors:
    """The factors of a square block.

    Args:
        block: [n, n]; with `symmetric`, what is above the diagonal is not read.
        tolerance: how much each low-rank block may lose by truncation, absolute.
        symmetric: Cholesky instead of LU.

    Raises:
        LeafError: a leaf is singular or, for Cholesky, not positive definite.
    """
    return _Factoring(tolerance, symmetric).of(block, Pending(), 0)


@dataclass(frozen=True)
class _Factoring:
    tolerance: float
    symmetric: bool

    def of(self, block: Block, pending: Pending, start: int) -> Factors:
        """Of ``block + pending``, which begins at the row `start` of the matrix."""
        if isinstance(block, LowRank) and block.shape[0] > LEAF:
            block = halved(block)
        if isinstance(block, Grid):
            spans = common(block.row_spans, block.column_spans)
            block = recut(block, spans, spans)
            if len(spans) > 1:
                return self._stairs(block, pending, start)
            return self.of(block.blocks[0][0], pending, start)
        formed = forming_error(block)
        block, error = fill(Dense(dense(block)), pending, self.tolerance)
        assert isinstance(block, Dense)
        found = self._corners(block.values, start)
        return Factors(found.lower, found.upper, found.error + self.halves * (formed + error))

    @property
    def halves(self) -> float:
        """What an error below the diagonal counts where it stands above, too."""
        return math.sqrt(2) if self.symmetric else 1.0

    def _corners(self, values: Tensor, start: int) -> Factors:
        rows = (start, start + values.shape[0])
        if self.symmetric:
            lower, wrong = torch.linalg.cholesky_ex(values)
            if int(wrong) or not bool(lower.isfinite().all()):
                raise LeafError(rows)
            corner = Corner(lower)
            error = gamma(corner.size + 1, values.dtype) * corner.magnitude**2
            return Factors(corner, corner, error)
        packed, pivots, wrong = torch.linalg.lu_factor_ex(values)
        if int(wrong) or not bool(packed.isfinite().all()):
            raise LeafError(rows)
        permutation = torch.lu_unpack(packed, pivots, unpack_data=False)[0]
        unit = packed.tril(-1)
        unit.diagonal().fill_(1)
        lower = Corner(unit, permutation.T.argmax(1))
        upper = Corner(packed.triu().T)
        error = gamma(lower.size, values.dtype) * lower.magnitude * upper.magnitude
        return Factors(lower, upper, error)

    def _stairs(self, block: Grid, pending: Pending, start: int) -> Factors:
        pending, error = settled(pending)
        spans = block.row_spans
        count, errors = len(spans), []
        done: list[Factors] = []
        left: list[list[Block]] = [[] for _ in spans]  # row i: the blocks of the lower factor
        above: list[list[Block]] = [[] for _ in spans]  # row j: of the transposed upper factor
        for k, columns in enumerate(spans):
            own = pending.within(columns, columns).plus(*self._before(left[k], above[k]))
            done.append(self.of(block.blocks[k][k], own, start + columns[0]))
            errors.append(done[k].error)
            for i in range(k + 1, count):
                own = pending.within(spans[i], columns).plus(*self._before(left[i], above[k]))
                found, lost = solve_block(
                    done[k].upper, transposed(block.blocks[i][k]), own.transposed(), self.tolerance
                )
                left[i].append(transposed(found))
                errors.append(self.halves * lost)
                if self.symmetric:
                    above[i].append(left[i][k])
            for j in range(k + 1, count if not self.symmetric else 0):
                own = pending.within(columns, spans[j]).plus(*self._before(left[k], above[j]))
                found, lost = solve_block(done[k].lower, block.blocks[k][j], own, self.tolerance)
                above[j].append(transposed(found))
                errors.append(lost)
        lower = Stairs(tuple(f.lower for f in done), tuple(tuple(line) for line in left))
        upper = lower
        if not self.symmetric:
            upper = Stairs(tuple(f.upper for f in done), tuple(tuple(line) for line in above))
        return Factors(lower, upper, self.halves * error + root_of_squares(errors))

    @staticmethod
    def _before(left: list[Block], above: list[Block]) -> list[Product]:
        """The products of all columns that are done already."""
        return [Product(a, transposed(b), -1.0) for a, b in zip(left, above, strict=False)]
