"""What Gaussian probes tell of a matrix, with certainty up to a stated probability.

The columns of Omega are k independent standard Gaussian vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# That one of the statements of a result fails: once in 10^10 draws.
FAILURE = 1e-10


def norm_factor(probes: int, failure: float = FAILURE) -> float:
    """What ``||F Omega||_F / sqrt(k)`` is multiplied with to bound ``||F||_F``.

    With weights w that sum to one, P(sum of w chi2 / k <= x) <= (x e^(1 - x))^(k / 2): Chernoff,
    and prod (1 + 2 u w) >= 1 + 2 u.
    """
    goal = 2 * math.log(failure) / probes
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle == 0 or math.log(middle) + 1 - middle <= goal:
            low = middle
        else:
            high = middle
    return 1 / math.sqrt(low) if low > 0 else math.inf


def trace_factor(probes: int, failure: float = FAILURE) -> float:
    """How many Frobenius norms ``tr(Omega^T F Omega) / k`` may be away from ``tr F``.

    2 sqrt(t / k) + 2 t / k with t = log(2 / failure): Laurent and Massart, Adaptive estimation of
    a quadratic functional by model selection, Ann. Statist. 28 (2000), lemma 1, for both signs. Of
    an F that is not symmetric only the symmetric part counts, which is no larger.
    """
    t = math.log(2 / failure)
    return 2 * math.sqrt(t / probes) + 2 * t / probes


@dataclass(frozen=True)
class Probed:
    """What is known of a symmetric F.

    Attributes:
        norm: an upper bound of the Frobenius norm.
        trace: an estimate.
        trace_error: how far it may be off.
        squares: an estimate of the squared Frobenius norm.
    """

    norm: float
    trace: float
    trace_error: float
    squares: float

    @classmethod
    def of(cls, products: Tensor, probes: Tensor) -> Probed:
        """From F Omega and Omega, both [n, k]."""
        count = probes.shape[1]
        squares = float(products.double().square().sum()) / count
        norm = norm_factor(count, FAILURE / 2) * math.sqrt(squares)
        trace = float((products.double() * probes.double()).sum()) / count
        return cls(norm, trace, trace_factor(count, FAILURE / 2) * norm, squares)

    def log_determinant(self) -> tuple[float, float]:
        """``(value, bound)`` of log det(I + F); infinite where F may be as large as the identity.

        log(1 + x) = x - rest with 0 <= rest <= x^2 / (2 (1 - abs(x))).
        """
        if self.norm >= 1:
            return self.trace, math.inf
        most = self.norm**2 / (2 * (1 - self.norm))
        rest = min(self.squares / 2, most)
        return self.trace - rest, self.trace_error + max(rest, most - rest)
