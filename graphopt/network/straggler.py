"""How much longer the slowest of many ranks takes than the average one."""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, inf, log, log1p, sqrt

from graphopt.errors import ArgumentError

_REACH, _STEP = 12.0, 1 / 256


@lru_cache(maxsize=1024)
def expected_maximum(ranks: int) -> float:
    """Mean of the largest of `ranks` independent standard normal variables.

    Integrated numerically from the distribution of the maximum, exact to about 1e-9; the familiar
    ``sqrt(2 ln ranks)`` is 43 % too large at 8 ranks and still 10 % at 27,600.

    Raises:
        ArgumentError: for less than one rank.
    """
    _check(ranks)
    if ranks == 1:
        return 0.0
    count = int(2 * _REACH / _STEP)
    total = 0.0
    for index in range(count + 1):
        x = -_REACH + index * _STEP
        below = exp(ranks * _log_normal(x))
        weight = 0.5 if index in (0, count) else 1.0
        total += weight * ((1.0 - below) if x >= 0 else -below)
    # The integrand jumps by one at zero; the trapezoid rule would take the mean of both sides.
    return (total - 0.5) * _STEP


def delay(ranks: int, sigma: float) -> float:
    """Seconds that every synchronous step loses to its slowest rank.

    Args:
        ranks: number of ranks that wait for each other.
        sigma: standard deviation of one rank's step, in seconds, independent between ranks.

    Raises:
        ArgumentError: for less than one rank or a negative deviation.
    """
    if sigma < 0:
        raise ArgumentError(
            f"a standard deviation of {sigma} s is below zero",
            where="sigma",
            hint="give the spread of one rank's step in seconds, or 0 for none",
        )
    return sigma * expected_maximum(ranks)


def _log_normal(x: float) -> float:
    """Logarithm of the normal distribution function, without loss for large `x`."""
    if x > 0:
        return log1p(-0.5 * erfc(x / sqrt(2)))
    below = 0.5 * erfc(-x / sqrt(2))
    return log(below) if below > 0 else -inf


def _check(ranks: int) -> None:
    if ranks < 1:
        raise ArgumentError(
            f"{ranks} ranks have no slowest one",
            where="ranks",
            hint="use at least one rank",
        )
