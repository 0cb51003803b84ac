"""The best choice of formats: an exact minimum cut over time and shared casts.

An operator on the source's side of the cut is lowered. The edges that are cut are the times of all
operators in the format chosen, and one cast for each value that something reads in another format
than it has: a value has one auxiliary node per direction, so that all its readers share the cast.
What rounding does to the loss adds to the same edges, at a price per unit of loss: an operator that
rounds its result pays for it, and each reader that has a wide value rounded pays for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from graphopt.analysis.cut import SINK, SOURCE, Network
from graphopt.passes.precision.problem import Problem


@dataclass(frozen=True)
class Times:
    """Seconds of everything that can be chosen.

    Attributes:
        high: of each unit in float32.
        low: of each unit in the lower format.
        cast: of each value, to the other format.
    """

    high: Mapping[fx.Node, float]
    low: Mapping[fx.Node, float]
    cast: Mapping[fx.Node, float]

    def total(self, problem: Problem, low: frozenset[fx.Node]) -> float:
        """Seconds of a choice."""
        units = sum(self.low[n] if n in low else self.high[n] for n in problem.units)
        return units + sum(self.cast[value] for value, _ in problem.casts(low))


@dataclass(frozen=True)
class Noise:
    """The expected change of the loss by everything that can be rounded; infinite where unknown.

    Attributes:
        result: of each unit, by rounding its results.
        read: of each unit, by rounding a value that it reads, as ``(value, unit)``.
    """

    result: Mapping[fx.Node, float]
    read: Mapping[tuple[fx.Node, fx.Node], float]

    def total(self, problem: Problem, low: frozenset[fx.Node]) -> float:
        """The expected change by a choice."""
        owner = problem.owner()
        read = (
            self.read[value, node]
            for node in problem.units
            if node in low
            for value in dict.fromkeys(problem.units[node].read)
            if owner.get(value) not in low
        )
        return math.fsum(read) + math.fsum(self.result[n] for n in problem.units if n in low)


def minimum_cut(
    problem: Problem,
    times: Times,
    follow: bool = True,
    noise: Noise | None = None,
    price: float = 0.0,
) -> frozenset[fx.Node]:
    """The units to lower, so that no other choice takes less time, or costs less with its noise.

    Times are rounded to 2**-30 of their sum.

    Args:
        problem: what there is to decide.
        times: of everything.
        follow: lower an operator only where what it follows is lowered anyhow, so that nothing is
            rounded for it: sums of a wide and a narrow value stay wide.
        noise: of everything; what is unknown is not rounded.
        price: seconds per unit of loss; where it is infinite, nothing that changes the loss is
            rounded.
    """
    if not problem.units:
        return frozenset()
    network = Network()
    owner = problem.owner()

    def priced(change: float) -> float | None:
        if math.isinf(change) or (change > 0 and math.isinf(price)):
            return None
        return price * change if change > 0 else 0.0

    for node in problem.units:
        network.edge(SOURCE, node, times.high[node])
        network.edge(node, SINK, times.low[node])
        if noise is not None:
            network.edge(node, SINK, priced(noise.result[node]))
    for value in problem.values():
        cast, mine = times.cast[value], owner.get(value, SINK)
        readers = problem.readers.get(value, ())
        to_low, to_high = ("to low", value), ("to high", value)
        for reader in readers:
            follows = follow and value in problem.units[reader].followed
            network.edge(reader, mine if follows else to_low, None)
            if noise is not None and not follows:
                network.edge(reader, mine, priced(noise.read[value, reader]))
            if mine is not SINK:
                network.edge(to_high, reader, None)
        if readers:
            network.edge(to_low, mine, cast)
        if mine is not SINK:
            if value in problem.read_high:
                network.edge(to_high, SINK, None)
            network.edge(mine, to_high, cast)
    lowered = network.source_side()
    return frozenset(node for node in problem.units if node in lowered)
