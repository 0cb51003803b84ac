"""Measured times of earlier runs, kept per graph, torch version and machine."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import fx

from graphopt.cache import LONGEST, JsonCache, fingerprint
from graphopt.graph import Graph
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.mincut import Times
from graphopt.passes.precision.problem import Problem
from graphopt.passes.precision.times import measured_times
from graphopt.text import print_graph

CACHE = JsonCache("precision")


def kept_times(graph: Graph, problem: Problem, format: Format) -> tuple[Times, str]:
    """Times on this machine, and where they are from: ``"measured"`` or ``"kept"``."""
    key = fingerprint(format.name, names_of(problem), print_graph(graph))
    found = CACHE.read(key)
    kept = times_of(problem, found)
    if kept is not None:
        return kept, "kept"
    if found is not None:
        CACHE.distrust(key, "it has no times of these operators")
    times = measured_times(graph, problem, format)
    CACHE.write(key, data_of(problem, times))
    return times, "measured"


def names_of(problem: Problem) -> str:
    """What there is to time, as text: equal for equal problems."""
    units, values = ([n.name for n in nodes] for nodes in (problem.units, problem.values()))
    return json.dumps([units, values])


def data_of(problem: Problem, times: Times) -> dict[str, list[float]]:
    """Times as JSON has them, in the order of the problem."""
    units = list(problem.units)
    return {
        "high": [times.high[n] for n in units],
        "low": [times.low[n] for n in units],
        "cast": [times.cast[v] for v in problem.values()],
    }


def times_of(problem: Problem, data: object) -> Times | None:
    """The inverse; ``None`` unless it has one possible time for everything."""
    units, values = list(problem.units), problem.values()
    match data:
        case {"high": list(high), "low": list(low), "cast": list(cast), **rest} if not rest:
            pairs = ((high, units), (low, units), (cast, values))
            if all(len(times) == len(nodes) and _durations(times) for times, nodes in pairs):
                return Times(_by(units, high), _by(units, low), _by(values, cast))
    return None


def _by(nodes: Sequence[fx.Node], times: Sequence[float]) -> dict[fx.Node, float]:
    return dict(zip(nodes, times, strict=True))


def _durations(times: Sequence[object]) -> bool:
    return all(isinstance(t, float) and 0 <= t < LONGEST for t in times)
