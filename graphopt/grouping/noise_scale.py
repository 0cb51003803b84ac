"""The gradient noise scale: at which batch size more examples stop paying for themselves.

McCandlish et al., arXiv 1812.06162: B = tr(S) / |G|^2, where G is the true gradient and S the
covariance of one example's gradient. Data-parallel training sees gradients of two batch sizes, one
rank's and the mean over all ranks, and their squared norms are enough to estimate both terms.
Micro-batches that one process accumulates do as well as ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.errors import ArgumentError


def estimate(
    local_squared: float, reduced_squared: float, ranks: int, batch: int
) -> tuple[float, float]:
    """Unbiased estimates of tr(S) and of |G|^2 from one step.

    Args:
        local_squared: mean over ranks of the squared norm of the rank's own gradient.
        reduced_squared: squared norm of the mean gradient over ranks.
        ranks: number of gradients in that mean, at least 2.
        batch: examples behind each rank's gradient, which is a mean over them.

    Returns:
        tr(S) and |G|^2, in squared units of the gradient. Single steps are noisy: the second is
        often negative. Their ratio is biased, so average both before dividing.

    Raises:
        ArgumentError: a squared norm is negative, or `ranks` or `batch` is too small.
    """
    if ranks < 2:
        raise ArgumentError(
            f"the noise scale compares ranks, and ranks={ranks}",
            hint="count accumulated micro-batches as ranks, or leave the update out",
        )
    if batch < 1:
        raise ArgumentError(f"batch={batch} is no number of examples", hint="pass 1 or more")
    if local_squared < 0 or reduced_squared < 0:
        raise ArgumentError(
            f"squared norms {local_squared:g} and {reduced_squared:g} must not be negative",
            hint="pass sums of squares",
        )
    trace = batch * ranks / (ranks - 1) * (local_squared - reduced_squared)
    gradient_squared = (ranks * reduced_squared - local_squared) / (ranks - 1)
    return trace, gradient_squared


class NoiseScale:
    """A running estimate of the gradient noise scale.

    Numerator and denominator are exponential moving averages of their own, corrected for starting
    at 0, and are divided last. With `decay` d the average looks back about 1 / (1 - d) steps; 0.95
    follows training within some 20 steps, and values nearer to 1 are less noisy.

    Args:
        decay: weight of the past in each average, at least 0 and below 1.

    Raises:
        ArgumentError: `decay` is out of range.
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ArgumentError(f"decay={decay} is not in [0, 1)", hint="use 0.95")
        self.decay = decay
        self._steps = 0
        self._trace = 0.0
        self._gradient_squared = 0.0

    def update(self, local_squared: float, reduced_squared: float, ranks: int, batch: int) -> None:
        """Take in one step; parameters and errors are those of `estimate`.

        A step with a norm that is not finite, as loss scaling produces now and then, is left out:
        it would stay in the averages for good.
        """
        trace, gradient_squared = estimate(local_squared, reduced_squared, ranks, batch)
        if not (math.isfinite(trace) and math.isfinite(gradient_squared)):
            return
        self._trace += (1 - self.decay) * (trace - self._trace)
        self._gradient_squared += (1 - self.decay) * (gradient_squared - self._gradient_squared)
        self._steps += 1

    @property
    def steps(self) -> int:
        """How many steps were taken in."""
        return self._steps

    @property
    def trace(self) -> float | None:
        """Average estimate of tr(S); ``None`` before the first step."""
        return self._trace / self._weight if self._steps else None

    @property
    def gradient_squared(self) -> float | None:
        """Average estimate of |G|^2, which may be negative; ``None`` before the first step."""
        return self._gradient_squared / self._weight if self._steps else None

    @property
    def value(self) -> float | None:
        """The noise scale in examples.

        ``None`` before the first step and while the average of |G|^2 is not positive, which says
        that the noise exceeds what these ranks can average out.
        """
        if self._steps == 0 or self._gradient_squared <= 0:
            return None
        return max(0.0, self._trace) / self._gradient_squared

    def state_dict(self) -> dict[str, Any]:
        """Steps and averages, as numbers."""
        return {
            "steps": self._steps,
            "trace": self._trace,
            "gradient_squared": self._gradient_squared,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; `decay` stays as it is.

        Raises:
            KeyError: it is no state of a `NoiseScale`.
        """
        self._steps, self._trace = int(state["steps"]), float(state["trace"])
        self._gradient_squared = float(state["gradient_squared"])

    @property
    def _weight(self) -> float:
        """Total weight of all steps so far; the rest is that of the initial 0."""
        return 1.0 - self.decay**self._steps
