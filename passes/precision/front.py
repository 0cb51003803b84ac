"""The choices of formats between the fastest and the most exact, by a sweep of the price of noise.

Each is a minimum cut for some price of a unit of loss, so none of all choices that there are is
both faster and more exact than a mixture of two neighbours. The sweep halves the range of prices
where a further choice may lie, until there is none (the search of Eisner and Severance for the
breakpoints of a parametric minimum cut).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.passes.precision.mincut import Noise, Times, minimum_cut
from graphopt.passes.precision.problem import Problem

# A front of a thousand operators may have as many choices; nobody reads more.
LARGEST = 64


@dataclass(frozen=True)
class Point:
    """One choice.

    Attributes:
        low: what is lowered.
        seconds: of all units and casts.
        change: expected change of the loss.
    """

    low: frozenset[fx.Node]
    seconds: float
    change: float


def sweep(problem: Problem, times: Times, noise: Noise, follow: bool) -> tuple[Point, ...]:
    """The front, fastest first; the last one changes no loss.

    At most `LARGEST` choices: those where the front bends most are found first.
    """

    def at(price: float) -> Point:
        low = minimum_cut(problem, times, follow, noise, price)
        return Point(low, times.total(problem, low), noise.total(problem, low))

    found = [at(0.0), at(math.inf)]
    if found[0].change <= found[1].change:
        return (found[0],)
    open_ = [(found[0], found[1])]
    while open_ and len(found) < LARGEST:
        open_.sort(key=lambda pair: pair[0].change - pair[1].change)
        fast, exact = open_.pop()
        if exact.seconds <= fast.seconds:
            found.remove(fast)  # it was only faster by rounding
            continue
        price = (exact.seconds - fast.seconds) / (fast.change - exact.change)
        middle = at(price)
        gain = (fast.seconds + price * fast.change) - (middle.seconds + price * middle.change)
        between = exact.change < middle.change < fast.change
        if between and gain > 1e-7 * (fast.seconds + price * fast.change):
            found.append(middle)
            open_ += [(fast, middle), (middle, exact)]
    return tuple(_undominated(sorted(found, key=lambda p: (p.seconds, p.change))))


def within(front: Sequence[Point], budget: float) -> Point:
    """The fastest choice whose change of the loss is at most the budget."""
    return next((p for p in front if p.change <= budget), front[-1])


def _undominated(points: Sequence[Point]) -> list[Point]:
    kept: list[Point] = []
    for point in points:
        if not kept or point.change < kept[-1].change:
            kept.append(point)
    return kept
