"""How long each operator takes in either format, and each cast: measured, or from a roofline."""

from __future__ import annotations

import statistics

from torch import fx

from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.gradient_order import ASSUMED, Device, roofline
from graphopt.analysis.profile import profile_in_turn
from graphopt.graph import Graph, value_of
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.mincut import Times
from graphopt.passes.precision.problem import Problem
from graphopt.passes.precision.rewrite import lower


def assumed_times(graph: Graph, problem: Problem, format: Format) -> Times:
    """By the roofline of an assumed device of the class that the graph was captured on."""
    low, _ = _all_low(graph, problem, format)
    high_times, low_times = graph.get(roofline), roofline(low)
    return Times(
        high={n: high_times[n] for n in problem.units},
        low={n: low_times[m] for n, m in _pairs(problem, low).items()},
        cast={
            v: _cast_bytes(v, format) / _device(v).bandwidth + _device(v).overhead
            for v in problem.values()
        },
    )


def measured_times(graph: Graph, problem: Problem, format: Format, rounds: int = 7) -> Times:
    """On this machine, each operator on its own, the shortest of some rounds.

    A cast that is in the graph where everything is lowered has its own time, and another one that
    of those by their bytes.
    """
    low, casts = _all_low(graph, problem, format)
    high_times, low_times = profile_in_turn([graph, low], rounds=rounds, of_rounds=min)
    sources = {c: c.all_input_nodes[0] for c in casts}
    speeds = [_cast_bytes(value, format) / low_times[c] for c, value in sources.items()]
    shortest = min((low_times[c] for c in casts), default=0.0)
    speed = statistics.median(speeds) if speeds else 1.0
    timed = {value.name: low_times[c] for c, value in sources.items()}
    return Times(
        high={n: high_times[n] for n in problem.units},
        low={n: low_times[m] for n, m in _pairs(problem, low).items()},
        cast={
            v: timed.get(v.name, max(_cast_bytes(v, format) / speed, shortest))
            for v in problem.values()
        },
    )


def _all_low(graph: Graph, problem: Problem, format: Format) -> tuple[Graph, list[fx.Node]]:
    """A copy of the graph with all units lowered, and its casts."""
    copy = graph.copy()
    twins = dict(zip(graph.nodes, copy.nodes, strict=True))
    same = problem.on(twins)
    return copy, lower(copy, same, frozenset(same.units), format.dtype)


def _pairs(problem: Problem, low: Graph) -> dict[fx.Node, fx.Node]:
    """Of each unit its twin in the copy, which has its name."""
    by_name = {node.name: node for node in low.nodes}
    return {node: by_name[node.name] for node in problem.units}


def _cast_bytes(value: fx.Node, format: Format) -> float:
    """Bytes that a cast between the formats reads and writes."""
    fake = value_of(value)
    return tensor_bytes(fake) * (4 + format.dtype.itemsize) / float(fake.element_size())


def _device(value: fx.Node) -> Device:
    return ASSUMED.get(value_of(value).device.type, ASSUMED["cuda"])
