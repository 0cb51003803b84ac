"""How delayed SGD behaves on ``L(w) = curvature * w ** 2 / 2``: the roots of one polynomial.

Weights that evolve linearly are sums of modes ``z ** n``. With ``x = lr * curvature``, momentum m,
delay D, compensation (a, b) and prediction horizon T, the modes are the roots of ``N + x M``:

* no prediction, T = 0, and the velocity form: ``N = (z - 1)(z - m) z ** D`` and
  ``M = (T + a + b) z - (T + b m)``;
* the weight form: ``N = (z - 1)(z - m) z ** (D + 1)`` and
  ``M = ((a + b) z - b m)((1 + T) z - T)``;
* the geometric form is the velocity form with ``T = a m (1 - m ** n) / (1 - m)`` for n steps.

Kosson et al., arXiv 2003.11666, appendix on quadratic losses; derived again here, since what is
stable in practice fails first where it is unstable here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

GRID = 64  # angles per turn of z ** (D + 2)


@dataclass(frozen=True)
class DelayedQuadratic:
    """An update rule on a quadratic loss.

    Attributes:
        momentum: m, 0 to below 1.
        delay: D, updates between a forward and its gradient's arrival.
        velocity: a, the factor of the velocity in an update.
        gradient: b, the factor of the gradient.
        prediction: form of the prediction of weights; ``None`` for none.
        horizon: T, in updates.
    """

    momentum: float
    delay: int = 0
    velocity: float = 1.0
    gradient: float = 0.0
    prediction: str | None = None
    horizon: float = 0.0

    def polynomial(self, x: float) -> Polynomial:
        """The characteristic polynomial for ``x = lr * curvature``, lowest degree first."""
        still, moved = self._parts()
        return still + x * moved

    def decay(self, x: float) -> float:
        """The factor by which weights shrink per update in the long run; above 1 they grow."""
        return float(np.abs(self.polynomial(x).roots()).max())

    def largest_stable(self) -> float:
        """The ``lr * curvature`` up to which weights decay; 0 if they never do.

        It is the least x that has a root on the unit circle. There, ``x = -N(z) / M(z)`` has to be
        real and positive.
        """
        still, moved = self._parts()
        if moved(1.0) <= 0:
            return 0.0
        found = [float(-still(-1.0) / moved(-1.0))] if moved(-1.0) else []

        def x(angle: np.ndarray) -> np.ndarray:
            z = np.exp(1j * angle)
            return np.asarray(-still(z) / moved(z))

        # From just above 0, where x = 0 is trivially on the circle; all crossings at once.
        angles = np.linspace(0, math.pi, GRID * (self.delay + 3) + 1)[1:-1]
        signs = np.sign(x(angles).imag)
        crossing = np.flatnonzero(signs[:-1] * signs[1:] < 0)
        low, high, below = angles[crossing], angles[crossing + 1], signs[crossing]
        for _ in range(50):
            middle = (low + high) / 2
            same = np.sign(x(middle).imag) == below
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        found += [float(v) for v in x(low).real]
        return min((value for value in found if value > 0), default=math.inf)

    def _parts(self) -> tuple[Polynomial, Polynomial]:
        """N and M."""
        m, a, b, horizon = self.momentum, self.velocity, self.gradient, self.horizon
        z = Polynomial([0.0, 1.0])
        still = (z - 1) * (z - m) * Polynomial([0.0] * self.delay + [1.0])
        if self.prediction == "weight":
            return still * z, ((a + b) * z - b * m) * ((1 + horizon) * z - horizon)
        if self.prediction is None:
            horizon = 0.0
        elif self.prediction == "geometric":
            horizon = a * m * (1 - m**horizon) / (1 - m)
        return still, Polynomial([-(horizon + b * m), horizon + a + b])
