"""The choice of formats is the best one: brute force over all choices finds no better."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from graphopt.capture import capture
from graphopt.graph import Graph, value_of
from graphopt.passes.precision.formats import FORMATS
from graphopt.passes.precision.mincut import Times, minimum_cut
from graphopt.passes.precision.problem import Problem, find_problem
from graphopt.passes.precision.rules import Kind, kinds
from graphopt.passes.precision.tf import propagate
from graphopt.testing import joint_graphs

BF16 = FORMATS["bf16"]
KINDS = ("unary", "binary", "with_scalar", "transpose", "cat", "linear", "product", "softmax")
GRAPHS = joint_graphs(max_steps=4, kinds=KINDS)
LARGEST = 11

slowly = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def _times(problem: Problem, draw: st.DataObject) -> Times:
    seconds = st.integers(0, 20).map(float)
    high, low = ({n: draw.draw(seconds) for n in problem.units} for _ in range(2))
    return Times(high, low, {v: draw.draw(seconds) for v in problem.values()})


def _seconds(problem: Problem, times: Times, low: set[fx.Node]) -> float:
    """Counted edge by edge, from the graph: what reads a value in another format than it has."""
    total = sum(times.low[n] if n in low else times.high[n] for n in problem.units)
    for value in problem.values():
        owner = next((n for n, u in problem.units.items() if value in u.values), None)
        has_low = owner in low
        for wants_low in (False, True):
            readers = [
                user
                for user in value.users
                if (user in low and value in problem.units[user].read) is wants_low
            ]
            if readers and wants_low is not has_low:
                total += times.cast[value]
    return total


def _follows(problem: Problem, low: set[fx.Node]) -> bool:
    owner = {v: n for n, u in problem.units.items() for v in u.values}
    return all(
        owner.get(value) in low
        for node in low
        if problem.units[node].kind is Kind.INFER
        for value in problem.units[node].read
        if value_of(value).numel() == max(value_of(v).numel() for v in problem.units[node].read)
    )


@pytest.mark.parametrize("follow", [True, False])
@slowly
@given(graph=GRAPHS, draw=st.data())
def test_no_choice_takes_less_time(follow: bool, graph: Graph, draw: st.DataObject) -> None:
    problem = find_problem(graph, BF16, frozenset())
    assume(0 < len(problem.units) <= LARGEST)
    times = _times(problem, draw)
    found = minimum_cut(problem, times, follow)
    choices = (
        set(chosen)
        for count in range(len(problem.units) + 1)
        for chosen in itertools.combinations(problem.units, count)
    )
    best = min(
        _seconds(problem, times, low) for low in choices if not follow or _follows(problem, low)
    )
    assert not follow or _follows(problem, set(found))
    assert _seconds(problem, times, set(found)) == best
    assert times.total(problem, found) == best


@slowly
@given(graph=GRAPHS, draw=st.data())
def test_never_worse_than_the_rules_or_than_float32(graph: Graph, draw: st.DataObject) -> None:
    problem = find_problem(graph, BF16, frozenset())
    times = _times(problem, draw)
    best = times.total(problem, minimum_cut(problem, times, follow=False))
    assert best <= times.total(problem, propagate(problem, kinds(graph, BF16)))
    assert best <= times.total(problem, frozenset())


def test_nothing_is_lowered_where_nothing_is_gained() -> None:
    graph = capture(nn.Linear(4, 4), (torch.randn(2, 4),)).graph
    problem = find_problem(graph, BF16, frozenset())
    same = dict.fromkeys(problem.units, 1.0)
    casts = dict.fromkeys(problem.values(), 0.1)
    assert minimum_cut(problem, Times(same, same, casts)) == frozenset()
    fast = dict.fromkeys(problem.units, 0.0)
    everything = frozenset(problem.units)
    assert minimum_cut(problem, Times(same, fast, casts), follow=False) == everything
