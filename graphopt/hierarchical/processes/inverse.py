"""What is needed of the inverse of ``operator + shift * identity``, each with its error.

H is the operator with its shift, A the matrix that it stands for, L its whitening and
``F = L^-1 H L^-T - identity``. F is small but never formed: random probes measure it, and what
they say of it (see `probability`) holds with a probability of at least 1 - 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphopt.errors import IndefiniteError
from graphopt.hierarchical.probability import FAILURE, Probed, norm_factor
from graphopt.hierarchical.processes.hodlr import Operator
from graphopt.hierarchical.processes.whitening import Coupling, Whitening
from graphopt.hierarchical.rounding import gamma

_SOLVES = 60
# Of operands that are worth a product of their own.
_COLUMNS = 64


@dataclass(frozen=True)
class LogDeterminant:
    """Of A.

    Attributes:
        value: what was computed.
        error: how far that of H may be from it.
        wrong: how far that of A may be from that of H.
    """

    value: float
    error: float
    wrong: float


@dataclass(frozen=True, eq=False)
class Quadratic:
    """``y^T A^-1 y`` of columns.

    Attributes:
        value: [k] what was computed, float64.
        error: [k] how far those of H may be from it.
        wrong: [k] how far those of A may be from those of H.
    """

    value: Tensor
    error: Tensor
    wrong: Tensor


@dataclass(frozen=True, eq=False)
class Solved:
    """Columns x that nearly solve ``H x = b``, in positions.

    Attributes:
        x: [n, k].
        residual: ``b - H x``, [n, k].
        whitened: [k] norms of ``L^-1 residual``.
    """

    x: Tensor
    residual: Tensor
    whitened: Tensor


class Inverse:
    """Solves, the log-determinant and its derivatives.

    Attributes:
        probes: [n, k] random vectors.
        inner: ``L^-T probes``, [n, k].
        deviations: ``F probes``, [n, k].
        lost: what rounding may have added to norms of F.
        smallest: a lower bound of the eigenvalues of H.
        inverse_norm: a bound of the Frobenius norm of the inverse of H.
        centre: c, the inverse of the shift; 0 where no eigenvalues are known to be near it.
        spread: a bound of the Frobenius norm of ``H^-1 - c identity``.

    Args:
        operator: symmetric.
        shift: added to its diagonal.
        whitening: of both.
        semidefinite: whether what the operator stands for is known to be positive semidefinite:
            then no eigenvalue of A is below the shift.
        probes: how many random vectors measure F.
        generator: of the probes.

    Raises:
        IndefiniteError: F may be as large as the identity, or the error of the operator as large as
            the smallest eigenvalue.
    """

    def __init__(
        self,
        operator: Operator,
        shift: float,
        whitening: Whitening,
        *,
        semidefinite: bool = False,
        probes: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        self.operator = operator
        self.shift = shift
        self.whitening = whitening
        layout = whitening.layout
        shape = (len(layout.places), probes)
        self.probes = torch.randn(shape, dtype=operator.dtype, generator=generator)
        self.inner = layout.cut(whitening.backward(layout.pad(self.probes)))
        applied = self.apply(self.inner)
        self.deviations = layout.cut(whitening.forward(layout.pad(applied))) - self.probes
        self.probed = Probed.of(self.deviations, self.probes)
        norms = [float(t.double().square().sum()) / probes for t in (self.inner, applied)]
        lost = operator.rounding * norms[0]
        terms = layout.size + 2 * sum(whitening.ranks) + 8
        lost += gamma(terms, operator.dtype) * math.sqrt(norms[0] * norms[1] * shape[0])
        self.lost = lost + 8 * shape[0] * gamma(1, torch.float64)
        if not self.probed.norm + self.lost < 1:
            raise IndefiniteError(
                "the factor is too far from the matrix to say anything",
                hint="ask for a smaller tolerance, or add more to the diagonal (noise, nugget)",
            )
        self.smallest, self.inverse_norm = self._smallest(semidefinite, generator)
        if not self.smallest > operator.bound:
            raise IndefiniteError(
                f"the smallest eigenvalue may be {self.smallest:.1e}, and the error of the matrix "
                f"is {operator.bound:.1e}",
                hint="ask for a smaller tolerance, or add more to the diagonal (noise, nugget)",
            )
        self.centre, self.spread = self._spread(semidefinite)

    @property
    def deviation(self) -> float:
        """A bound of the spectral norm of F."""
        return self.probed.norm + self.lost

    def apply(self, values: Tensor) -> Tensor:
        """H times [n, k]."""
        return self.operator.product(values) + self.shift * values

    def whitened(self, values: Tensor) -> Tensor:
        """L^-1 times [n, k]."""
        return self.whitening.layout.cut(self.forward(values))

    def deviated(self, values: Tensor) -> Tensor:
        """F times [n, k]."""
        layout = self.whitening.layout
        inner = layout.cut(self.whitening.backward(layout.pad(values)))
        return self.whitened(self.apply(inner)) - values

    def forward(self, values: Tensor) -> Tensor:
        """L^-1 times [n, k]; padded rows."""
        return self.whitening.forward(self.whitening.layout.pad(values))

    def solve(self, right: Tensor, goal: float) -> Solved:
        """``H^-1 right`` by iterative refinement, each step of which shrinks L^-1 residual by F.

        Args:
            right: [n, k].
            goal: of the norm of each whitened residual; reached unless rounding stands before it.
        """
        layout = self.whitening.layout
        x, residual, whitened = torch.zeros_like(right), right, self.forward(right)
        norms = torch.linalg.vector_norm(whitened, dim=0)
        for _ in range(_SOLVES):
            new = x + layout.cut(self.whitening.backward(whitened))
            left = right - self.apply(new)
            outer = self.forward(left)
            found = torch.linalg.vector_norm(outer, dim=0)
            if not bool((found < norms).any()):
                break
            x, residual, whitened, norms = new, left, outer, found
            if bool((norms <= goal).all()):
                break
        return Solved(x, residual, norms)

    def quadratic(self, right: Tensor, solved: Solved) -> Quadratic:
        """``y^T A^-1 y`` of columns: y^T x + r^T x, and at most r^T H^-1 r beyond."""
        x, r, y = (t.double() for t in (solved.x, solved.residual, right))
        rest = self.energy(solved)
        size = torch.linalg.vector_norm(x, dim=0) + (rest / self.smallest).sqrt()
        lost = self.operator.rounding * size.square()
        lost = lost + 2 * gamma(len(y), torch.float64) * torch.linalg.vector_norm(y, dim=0) * size
        bound = self.operator.bound
        wrong = bound * (1 + bound / (self.smallest - bound)) * size.square()
        return Quadratic((y * x + r * x).sum(0) + rest / 2, rest / 2 + lost, wrong)

    def with_residual(self, solved: Solved, residual: Tensor) -> Solved:
        """The same x with another residual, that of A instead of that of H, for instance."""
        norms = torch.linalg.vector_norm(self.forward(residual), dim=0)
        return Solved(solved.x, residual, norms)

    def exact_quadratic(self, right: Tensor, solved: Solved, lost: Tensor) -> Quadratic:
        """`quadratic`, from residuals of A that rounding has moved by `lost` [n, k] at most."""
        x, r, y = (t.double() for t in (solved.x, solved.residual, right))
        shrunk = 1 - self.operator.bound / self.smallest
        moved = torch.linalg.vector_norm(lost, dim=0) / math.sqrt(self.smallest)
        rest = (self.energy(solved).sqrt() + moved).square() / shrunk
        sums = gamma(len(y) + 4, torch.float64) * ((y.abs() + r.abs()) * x.abs()).sum(0)
        rounding = (lost * x.abs()).sum(0) + sums
        value = (y * x + r * x).sum(0) + rest / 2
        return Quadratic(value, rest / 2 + rounding, torch.zeros_like(rest))

    def energy(self, solved: Solved) -> Tensor:
        """[k] bounds of ``r^T H^-1 r`` of the residuals."""
        return solved.whitened.double().square() / (1 - self.deviation)

    @cached_property
    def log_determinant(self) -> LogDeterminant:
        """That of L L^T; what the probes say of the rest is mostly noise, and is in the error."""
        value, error = self.probed.log_determinant()
        own = float(self.whitening.log_determinant())
        bound = self.operator.bound
        away = bound / self.smallest
        # tr(H^-1 E) and the rest of the series, for a difference E of small trace.
        first = self.spread * bound + self.centre * self.operator.diagonal_bound
        wrong = first + away**2 / (2 * (1 - away))
        wrong = min(wrong, bound * self.inverse_norm / (1 - away))
        lost = self.lost + gamma(4, torch.float64) * abs(own)
        return LogDeterminant(own, abs(value) + error + lost, wrong)

    @cached_property
    @torch.no_grad()
    def log_determinant_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """The derivatives of log det A by the shift, and by the parameters.

        They are tr((L L^T)^-1 dH). It is that of the leaves, and for each node of
        ``w [U a U^T, U b V^T; V b U^T, V a V^T] w^T`` with w the L^-T of both children, and a, b
        those of the inverse of the middle.
        """
        operator, whitening = self.operator, self.whitening
        layout = whitening.layout
        # What the inverse has on the diagonal blocks of the leaves.
        leaves = whitening.leaves.mT @ whitening.leaves
        size = leaves.shape[:2]
        found = [torch.zeros_like(p, dtype=torch.float64) for p in operator.parameters]
        terms: list[tuple[Tensor, Tensor]] = []
        for number in reversed(range(len(whitening.levels))):
            coupling = whitening.levels[number]
            level = len(whitening.levels) - 1 - number
            if not coupling.rank:
                continue
            a, b = coupling.function(torch.reciprocal)
            below = Whitening(layout, whitening.leaves, whitening.levels[:number])
            inner = below.backward(_panel(coupling))
            for w, v in _batches([*terms, (inner, b)]):
                gradients = operator.inner_gradient(layout.cut(w), layout.cut(v), level, own=False)
                for total, own in zip(found, gradients, strict=True):
                    total.add_(own)
            leaves.baddbmm_(_weighted(inner, a).view(*size, -1), inner.view(*size, -1).mT)
            terms.append((inner, a))
        for total, own in zip(found, operator.diagonal_gradient(layout.depth, leaves), strict=True):
            total.add_(own)
        present = layout.pad(torch.ones(len(layout.places), 1, dtype=leaves.dtype)).view(size)
        shift = (leaves.diagonal(dim1=1, dim2=2) * present).sum()
        # tr(A^-1 (A - shift)) is known from that of the inverse.
        rest = len(layout.places) - self.shift * shift
        for total, own in zip(found, operator.own_gradient(rest), strict=True):
            total.add_(own)
        return shift, found

    def _smallest(
        self, semidefinite: bool, generator: torch.Generator | None
    ) -> tuple[float, float]:
        """A lower bound of the eigenvalues of H, and an upper one of the norm of its inverse.

        Without the shift both are from ||(L L^T)^-1||_F, which is larger by 1 - F at most.
        """
        n, count = self.probes.shape
        if semidefinite and self.shift > self.operator.bound:
            smallest = self.shift - self.operator.bound
            return smallest, math.sqrt(n) / smallest
        omega = torch.randn((n, count), dtype=self.operator.dtype, generator=generator)
        size = float(torch.linalg.vector_norm(self.whitening.solve(omega).double()))
        norm = norm_factor(count, FAILURE) * size / math.sqrt(count) / (1 - self.deviation)
        return 1 / norm, norm

    def _spread(self, semidefinite: bool) -> tuple[float, float]:
        """``centre`` and ``spread``: by the probes for L L^T, and what F adds for H."""
        if not (semidefinite and self.shift > 0):
            return 0.0, self.inverse_norm
        centre, count = 1 / self.shift, self.probes.shape[1]
        away = self.whitening.solve(self.probes) - centre * self.probes
        size = norm_factor(count, FAILURE) / math.sqrt(count)
        size *= float(torch.linalg.vector_norm(away.double()))
        f = self.deviation
        rest = (1 + f) * f / (1 - f) + 8 * self.lost * math.sqrt(len(self.probes))
        return centre, size + rest / self.smallest


def _panel(coupling: Coupling) -> Tensor:
    """[rows, r]: U above V of each node."""
    return torch.stack([coupling.left, coupling.right], 1).flatten(0, 2)


def _weighted(panel: Tensor, weights: Tensor) -> Tensor:
    """[rows, r] times [nodes, r], which belong to consecutive rows."""
    return (panel.view(len(weights), -1, panel.shape[1]) * weights.unsqueeze(1)).view_as(panel)


def _batches(terms: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Panels times their weights, and panels, some of them beside each other; in padded rows."""
    left: list[Tensor] = []
    right: list[Tensor] = []
    for number, (panel, weights) in enumerate(terms):
        left.append(_weighted(panel, weights))
        right.append(panel)
        if number + 1 == len(terms) or sum(own.shape[1] for own in right) >= _COLUMNS:
            yield torch.cat(left, 1), torch.cat(right, 1)
            left, right = [], []
