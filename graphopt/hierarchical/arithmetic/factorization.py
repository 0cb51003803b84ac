"""`Factorization`: systems, the log-determinant and its sign, each with a bound that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.arithmetic.factor import Factors
from graphopt.hierarchical.arithmetic.inverse_norm import (
    FAILURE,
    PROBES,
    InverseNorms,
    inverse_norms,
    probes,
    solved,
)
from graphopt.hierarchical.arithmetic.magnitudes import length, magnitude
from graphopt.hierarchical.arithmetic.parts import any_tensor, apply
from graphopt.hierarchical.arithmetic.triangular import Corner, Triangle
from graphopt.hierarchical.blocks import transposed
from graphopt.hierarchical.bounded import Bounded
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.probability import norm_factor, trace_factor
from graphopt.hierarchical.rounding import gamma

_DOUBLE = torch.float64


@dataclass(frozen=True, eq=False)
class Factorization:
    """Triangular factors M of a square matrix, and how far they are from what it stands for.

    With A the true matrix, which `matrix` stands for, and a bound `bound` of ``|A - M|_F``, all
    results are about A. They hold with the probability of the bound of the matrix
    (`HMatrix.confidence`), less 1e-10, as the norms of ``M^-1`` are bounded by random vectors (see
    `inverse_norm`), unless the smallest eigenvalue was known. Where ``|M^-1|_2 bound >= 1``, A may
    be singular for all that is known: then bounds are inf, and a smaller tolerance helps.

    Attributes:
        matrix: what was factored, with the nugget.
        factors: the triangles, in the order of positions.
        symmetric: by Cholesky.
        nugget: what was added to the diagonal.
        known: a bound of ``|A^-1|_2`` that was given; inf if none was.
    """

    matrix: HMatrix
    factors: Factors
    symmetric: bool
    nugget: float
    known: float

    @property
    def bound(self) -> float:
        """Of ``|A - M|_F``: truncation, rounding, and the bound of the matrix."""
        # Cholesky reads one half: an error of that half is in both halves of what it factors.
        halves = math.sqrt(2) if self.symmetric else 1.0
        return self.factors.error + halves * self.matrix.bound

    @cached_property
    def norms(self) -> InverseNorms:
        """Of ``M^-1``."""
        known = math.inf
        if 1 / self.known > self.bound:
            # The smallest singular value of M is off by at most the bound.
            known = 1 / (1 / self.known - self.bound)
        return inverse_norms(self.factors, known)

    @property
    def distance(self) -> float:
        """A bound of ``|M^-1 (A - M)|_F``; from 1 on nothing is known."""
        return self.norms.spectral * self.bound if self.bound else 0.0

    @property
    def inverse_norm(self) -> float:
        """A bound of ``|A^-1|_2``."""
        return min(self.known, _over(self.norms.spectral, 1 - self.distance))

    def solve(self, b: Tensor, refinements: int = 1, transpose: bool = False) -> Bounded[Tensor]:
        """``x`` with ``A x = b``.

        The residual with the matrix before it was factored is formed in float64, solved with the
        factors and subtracted, `refinements` times. One more such correction is the bound:
        ``x - A^-1 b = (I + M^-1 (A - M))^-1 M^-1 (A x - b)``.

        Args:
            b: [n] or [n, c] in the original order, float32 or float64.
            refinements: how many corrections.
            transpose: with the transposed matrix.

        Returns:
            The solution in the shape and dtype of b, and a bound of the Euclidean norm of the
            error of each column.

        Raises:
            ArgumentError: a right-hand side of another shape, or not finite.
        """
        rows, columns = self.matrix.rows, self.matrix.columns
        if transpose:
            rows, columns = columns, rows
        right = checked_right_side(b, self.matrix.shape[0])
        right = rows.to_positions(right)
        found = refined(
            lambda x: apply(self.matrix.root, x, transpose),
            lambda x: self.solve_positions(x, transpose),
            right,
            refinements,
        )
        sizes, sides = (torch.linalg.vector_norm(x.double(), dim=0) for x in (found.x, right))
        lost = (self.matrix.bound + product_loss(self.matrix)) * sizes + gamma(2, _DOUBLE) * sides
        errors = self.error_bound(found.correction, lost)
        x = columns.to_original(found.x)
        return Bounded(x.reshape(b.shape), float(errors.max()) if errors.numel() else 0.0)

    def solve_positions(self, b: Tensor, transpose: bool = False) -> Tensor:
        """``M^-1 b``, once and without a bound; b: [n, c] in the order of positions."""
        return solved(self.factors, b, transpose)

    def error_bound(self, correction: Tensor, lost: Tensor) -> Tensor:
        """Bounds of the errors of solutions x, [c].

        Args:
            correction: [n, c], ``M^-1 r`` in float64 for a residual r.
            lost: [c], a bound of the norm of ``r - (A x - b)``.
        """
        norms = self.norms
        if not self.distance < 1 or not math.isfinite(norms.spectral):
            return torch.full_like(lost, math.inf)
        own: Tensor = torch.linalg.vector_norm(correction, dim=0)
        own = own * (1 + norms.spectral * norms.lost)
        return (own + norms.spectral * lost) / (1 - self.distance) * (1 + 1e-9)

    def logdet(self) -> Bounded[float]:
        """The logarithm of ``|det A|``.

        With ``X = M^-1 (A - M)`` and ``|X|_F <= t < 1``, ``log det(I + X)`` is the trace of X and
        a rest of at most ``-log(1 - t) - t``, as ``|tr X^k| <= t^k`` for k > 1. The trace is at
        most ``|M^-1|_F |A - M|_F``; where random vectors say less of the part of X that comes from
        the factors, only the other one is bounded so. Where the bound is finite, `sign` is right.
        """
        diagonal = torch.cat([c.values.diagonal() for c in self._corners()]).double()
        logarithms = diagonal.abs().log()
        if self.symmetric:
            logarithms = 2 * logarithms
        value, size = float(logarithms.sum()), float(logarithms.abs().sum())
        rounding = gamma(diagonal.numel() + 4, _DOUBLE) * (size + 1)
        if not math.isfinite(self.norms.frobenius):
            return Bounded(value, math.inf)
        first = self.norms.frobenius * self.bound if self.bound else 0.0
        size, trace = self._probed
        t = min(self.distance, size + self.norms.spectral * self.matrix.bound)
        first = min(first, trace + self.norms.frobenius * self.matrix.bound)
        if not t < 1:
            return Bounded(value, math.inf)
        rest = -math.log1p(-t) - t if t > 1e-5 else t * t
        return Bounded(value, (first + rest) * (1 + 1e-9) + rounding)

    @cached_property
    def _probed(self) -> tuple[float, float]:
        """Bounds of the Frobenius norm and of the trace of ``M^-1 H - I``; H is `matrix`."""
        root, spectral = self.matrix.root, self.norms.spectral
        normal = probes(self.matrix.shape[0], any_tensor(root), seed=3)
        found = self.solve_positions(apply(root, normal))
        away = found - normal
        sizes = [torch.linalg.vector_norm(v, dim=0) for v in (normal, found, away)]
        lost = spectral * (product_loss(self.matrix) * sizes[0] + self.norms.lost * sizes[1])
        lost = (lost + gamma(2, _DOUBLE) * sizes[2]) * (1 + 1e-9)
        size = float((sizes[2] + lost).square().mean().sqrt()) * norm_factor(PROBES, FAILURE)
        trace = float((away * normal).sum().abs() + (lost * sizes[0]).sum()) / PROBES
        trace += gamma(normal.numel() + 2, _DOUBLE) * float((sizes[2] * sizes[0]).mean())
        return size * (1 + 1e-9), trace + trace_factor(PROBES, FAILURE) * size

    @property
    def sign(self) -> int:
        """Of the determinant: 1 or -1."""
        if self.symmetric:
            return 1
        found, rows, columns = 1, self.matrix.rows.order, self.matrix.columns.order
        if not torch.equal(rows, columns):
            found = _parity(rows) * _parity(columns)
        for corner in self._corners():
            found *= 1 if corner.order is None else _parity(corner.order)
            found *= -1 if int((corner.values.diagonal() < 0).sum()) % 2 else 1
        return found

    def _corners(self) -> Iterator[Corner]:
        yield from _corners(self.factors.lower)
        if not self.symmetric:
            yield from _corners(self.factors.upper)


@dataclass(frozen=True)
class Refined:
    """A solution x [n, c] and ``M^-1 (A x - b)`` in float64."""

    x: Tensor
    correction: Tensor


@torch.no_grad()
def refined(
    product: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    b: Tensor,
    refinements: int,
) -> Refined:
    """Solve by the factors, and correct by residuals in float64."""
    x = inverse(b)
    right = b.double()
    correction = inverse(product(x.double()) - right)
    for _ in range(refinements):
        new = (x.double() - correction).to(b.dtype)
        after = inverse(product(new.double()) - right)
        if not bool(after.norm() < correction.norm()):
            break
        x, correction = new, after
    return Refined(x, correction)


def product_loss(matrix: HMatrix) -> float:
    """What a product with x loses in float64, over the norm of x; `transpose` included."""
    count = max(length(matrix.root), length(transposed(matrix.root)))
    return gamma(count, _DOUBLE) * magnitude(matrix.root)


def checked_right_side(b: Tensor, n: int) -> Tensor:
    """[n, c] of a right-hand side of [n] or [n, c].

    Raises:
        ArgumentError: it has another shape or dtype, or is not finite.
    """
    if b.dim() not in (1, 2) or b.shape[0] != n:
        raise ArgumentError(
            f"a right-hand side of {list(b.shape)} for {n} equations", hint=f"pass [{n}, c]"
        )
    if b.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"a right-hand side of {b.dtype}", hint="convert it to float64")
    if not bool(b.isfinite().all()):
        raise ArgumentError("the right-hand side is not finite", hint="mend it first")
    return b.detach().reshape(n, -1)


def _corners(operator: Triangle) -> Iterator[Corner]:
    if isinstance(operator, Corner):
        yield operator
    else:
        for inner in operator.diagonal:
            yield from _corners(inner)


def _parity(order: Tensor) -> int:
    """1 for an even permutation, -1 for an odd one."""
    places, seen, sign = order.tolist(), set[int](), 1
    for start in range(len(places)):
        steps = 0
        while start not in seen:
            seen.add(start)
            start, steps = places[start], steps + 1
        if steps and steps % 2 == 0:
            sign = -sign
    return sign


def _over(value: float, by: float) -> float:
    return value / by if by > 0 else math.inf
