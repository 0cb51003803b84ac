"""How far the computed derivatives of a log-likelihood may be from those of the exact one.

Twice the derivative by a number is ``a^T dA a - tr(A^-1 dA)`` with ``A a = y``. H with the factor L
is what stands for A, dH for dA, F = L^-1 H L^-T - identity and G = L^-1 dH L^-T. Norms of F, G and
F G come from the probes of the `Inverse`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.probability import FAILURE, norm_factor, trace_factor
from graphopt.hierarchical.processes.inverse import Inverse
from graphopt.hierarchical.rounding import gamma

# Norms of one number have to hold at once: those of G and F G, and a trace.
_FAILURE = FAILURE / 3


@dataclass(frozen=True, eq=False)
class Changed:
    """A derivative dA of A, as it is stored, and times a solution.

    Attributes:
        probes: dH times `Inverse.inner`, [n, k].
        bound: of the Frobenius norm of dA - dH.
        trace: a bound of the absolute trace of dA - dH.
        norm: a bound of the norm of dA.
        applied: ``dA x``, [n, 1].
        lost: [n, 1] how far that may be off.
    """

    probes: Tensor
    bound: float
    trace: float
    norm: float
    applied: Tensor
    lost: Tensor

    @classmethod
    def identity(cls, inverse: Inverse, x: Tensor) -> Changed:
        """The derivative by the shift."""
        return cls(inverse.inner, 0.0, 0.0, 1.0, x, torch.zeros_like(x))


@dataclass(frozen=True, eq=False)
class Correction:
    """What ``A^-1 y`` is beyond x.

    Attributes:
        inverse: of A.
        x: [n, 1].
        step: [n, 1] what was computed of it.
        away: a bound of the rest, in the norm of A.
    """

    inverse: Inverse
    x: Tensor
    step: Tensor
    away: float

    @classmethod
    def of(
        cls, inverse: Inverse, right: Tensor, x: Tensor, applied: Tensor, lost: Tensor
    ) -> Correction:
        """Of y [n, 1] and the matrix without its shift times x, which may be off by `lost`."""
        residual = right - applied - inverse.shift * x
        norm = float(torch.linalg.vector_norm(inverse.whitened(residual)))
        solved = inverse.solve(residual, 1e-6 * norm)
        sizes = right.abs() + applied.abs() + inverse.shift * x.abs()
        lost = lost + gamma(4, torch.float64) * sizes
        operator, least = inverse.operator, inverse.smallest - inverse.operator.bound
        rest = (operator.bound + operator.rounding) * _norm(solved.x) + _norm(lost)
        energy = math.sqrt(float(inverse.energy(solved)) * inverse.smallest / least)
        return cls(inverse, x, solved.x, energy + rest / math.sqrt(least))

    def form(self, changed: Changed) -> tuple[float, float, float]:
        """``a^T dA a``, a bound of its error, and what `step` has added to ``x^T dA x``."""
        inverse, operator = self.inverse, self.inverse.operator
        least, applied, lost = inverse.smallest - operator.bound, changed.applied, changed.lost
        first, added = float((self.x * applied).sum()), 2 * float((self.step * applied).sum())
        # In the norm of A^-1, by that of L^-T L^-1.
        size = _norm(inverse.whitened(applied)) / math.sqrt(1 - inverse.deviation)
        size *= math.sqrt(inverse.smallest / least) * (1 + inverse.lost)
        size += _norm(lost) / math.sqrt(least)
        both = self.x.abs() + 2 * self.step.abs()
        sums = gamma(len(self.x) + 4, torch.float64) * float((both * applied.abs()).sum())
        rest = (_norm(self.step) + self.away / math.sqrt(least)) ** 2 * changed.norm
        error = float((both * lost).sum()) + 2 * self.away * size + rest + sums
        return first + added, error, added


@torch.no_grad()
def trace_error(inverse: Inverse, changed: Changed) -> float:
    """Of ``tr((L L^T)^-1 dH)`` as that of ``A^-1 dA``.

    The differences are ``tr(H^-1 (dA - dH))``, ``tr(((I + F)^-1 - I) G)`` and
    ``tr((A^-1 - H^-1) dA)``.
    """
    factored, inner = _factored(inverse, changed.probes)
    wrong, smallest = inverse.operator.bound, inverse.smallest
    matrix = wrong / (1 - wrong / smallest) * (inner + changed.bound / smallest**2)
    stored = inverse.centre * changed.trace + inverse.spread * changed.bound
    return stored + factored + matrix


@torch.no_grad()
def shift_error(inverse: Inverse, changed: Changed) -> float:
    """`trace_error` of the derivative by the shift, for which dA is the identity.

    ``tr(A^-1 - H^-1)`` is ``tr(H^-2 E)`` to first order with E = H - A, whose trace is known.
    """
    factored, inner = _factored(inverse, changed.probes)
    wrong, smallest, c = inverse.operator.bound, inverse.smallest, inverse.centre
    away = wrong / smallest
    first = c**2 * inverse.operator.diagonal_bound + inverse.spread * (1 / smallest + c) * wrong
    second = away**2 / smallest / (1 - away)
    return factored + min(wrong / (1 - away) * inner, first + second)


def _factored(inverse: Inverse, probes: Tensor) -> tuple[float, float]:
    """Bounds of ``tr(((I + F)^-1 - I) G)``, and of the Frobenius norm of ``H^-1 dH H^-1``."""
    f, count = inverse.deviation, inverse.probes.shape[1]
    factor = norm_factor(count, _FAILURE) / math.sqrt(count)
    white = inverse.whitened(probes)
    size = factor * float(torch.linalg.vector_norm(white)) * (1 + inverse.lost)
    product = factor * float(torch.linalg.vector_norm(inverse.deviated(white)))
    product += inverse.lost * size
    # tr(F G) by the probes and its scatter, then the rest of the series of (I + F)^-1.
    seen = abs(float((inverse.deviations * white).sum())) / count
    trace = seen + trace_factor(count, _FAILURE) * product + f * product / (1 - f)
    # At most ||(I + F)^-1/2 G (I + F)^-1/2|| / smallest; the roots are I and a multiple of F.
    root = math.sqrt(1 - f)
    inner = (size + (1 / root - 1) / f * product) / root if f else size
    return trace + inverse.lost * size, inner / inverse.smallest


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))
