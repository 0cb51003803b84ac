"""Orders against brute force, and reordered graphs against their own results."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.analysis.gradient_order import gradient_order
from graphopt.graph import Graph
from graphopt.network.curve import Curve
from graphopt.passbase import EXACT, PassContext
from graphopt.passes import schedule
from graphopt.passes.schedule import Schedule
from graphopt.passes.schedule.order import (
    Task,
    best_first,
    candidates,
    johnson,
    ready_times,
)
from graphopt.passes.schedule.rewrite import reorder, split, splittable
from graphopt.passes.schedule.search import tasks_of
from graphopt.plan.grouping import Ready
from graphopt.testing import assert_same, check_pass, inputs_for, joint_graphs, run_graph
from graphopt.text import print_graph
from graphopt.verify import verify

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SLOW = Curve.affine(1e-7, 1e-6, "a slow link without latency")


@st.composite
def problems(draw: st.DrawFn) -> list[Task]:
    """A chain with jobs that hang off it; times and sizes are small whole numbers."""
    chain, jobs = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    time, size = st.integers(0, 5), st.integers(1, 9)

    def ready(name: str) -> tuple[Ready, ...]:
        return (Ready(name, draw(size), 0.0),)

    tasks = [
        Task(draw(time), i - 1, ready(f"chain {i}") if draw(st.booleans()) else ())
        for i in range(chain)
    ]
    return tasks + [
        Task(draw(time), draw(st.integers(-1, chain - 1)), ready(f"job {i}")) for i in range(jobs)
    ]


def legal_orders(tasks: Sequence[Task]) -> Iterator[tuple[int, ...]]:
    for order in permutations(range(len(tasks))):
        place = {index: position for position, index in enumerate(order)}
        if all(t.after < 0 or place[t.after] < place[i] for i, t in enumerate(tasks)):
            yield order


def finish(ready: Sequence[Ready], cost: Callable[[float], float]) -> float:
    """The best grouping of neighbours, by the plain recurrence."""
    sizes, best = [0], [0.0]
    for item in ready:
        sizes.append(sizes[-1] + item.bytes)
    for end in range(1, len(ready) + 1):
        there = ready[end - 1].seconds
        spans = (max(best[i], there) + cost(sizes[end] - sizes[i]) for i in range(end))
        best.append(min(spans))
    return best[-1]


@QUICK
@given(problems())
def test_johnson_is_optimal_when_a_message_costs_only_its_bytes(tasks: list[Task]) -> None:
    def cost(size: float) -> float:
        return 0.7 * size

    found = finish(ready_times(tasks, johnson(tasks, 0.7)), cost)
    best = min(finish(ready_times(tasks, order), cost) for order in legal_orders(tasks))
    assert found == pytest.approx(best)


@QUICK
@given(problems())
def test_candidates_are_legal_orders(tasks: list[Task]) -> None:
    legal = set(legal_orders(tasks))
    found = candidates(tasks, lambda size: 1 + size)
    assert set(found.values()) <= legal
    assert len(set(found.values())) == len(found)


def test_with_latency_the_found_orders_stay_near_the_optimum() -> None:
    """Fixed instances: the optimum is missed in a few, by little; a worse search would show."""
    missed, worst, count = 0, 1.0, 150

    def cost(size: float) -> float:
        return 1.5 + 0.7 * size

    for seed in range(count):
        draw = random.Random(seed)
        chain, jobs = draw.randint(1, 3), draw.randint(1, 4)
        tasks = [Task(draw.randint(0, 5), i - 1) for i in range(chain)]
        for i in range(jobs):
            item = Ready(f"job {i}", draw.randint(1, 9), 0.0)
            tasks.append(Task(draw.randint(0, 5), draw.randint(-1, chain - 1), (item,)))
        best = min(finish(ready_times(tasks, order), cost) for order in legal_orders(tasks))
        found = best_first(tasks, cost, lambda ready: finish(ready, cost))[0][0]
        missed += found > best + 1e-9
        worst = max(worst, found / best)
    assert missed <= 0.08 * count
    assert worst <= 1.1


@pytest.fixture(autouse=True)
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "link_curve", lambda *_: SLOW)


# Most generated steps have no parameters; these kinds have some.
LAYERS = joint_graphs(kinds=["linear", "convolution", "layer_norm", "batch_norm", "embedding"])


@pytest.mark.hypothesis  # examples are generated within
@pytest.mark.parametrize("graphs", [joint_graphs(), LAYERS], ids=["all", "layers"])
def test_pass_is_proved(graphs: st.SearchStrategy[Graph]) -> None:
    check_pass(Schedule(memory=10.0), graphs=graphs, max_examples=30, mesh={"dp": 4})


@QUICK
@given(LAYERS)
def test_once_is_enough_where_memory_is_no_limit(graph: Graph) -> None:
    pass_, ctx = Schedule(memory=1e9), PassContext(mesh={"dp": 4})
    pass_.apply(graph, ctx)
    text = print_graph(graph)
    assert not pass_.apply(graph, ctx).changed
    assert print_graph(graph) == text


@QUICK
@given(st.one_of(joint_graphs(), LAYERS), st.randoms(use_true_random=False))
def test_any_legal_order_with_all_convolutions_split_is_bit_equal(
    graph: Graph, draw: random.Random
) -> None:
    inputs = inputs_for(graph)
    torch.manual_seed(0)
    expected = run_graph(graph, inputs)
    split(graph, splittable(graph))
    tasks, members = tasks_of(graph, graph.get(gradient_order))
    order, left = [], set(range(len(tasks)))
    while left:
        free = sorted(i for i in left if tasks[i].after not in left)
        order.append(draw.choice(free))
        left.discard(order[-1])
    reorder(graph, [node for index in order for node in members[index]])
    verify(graph, full=True)
    torch.manual_seed(0)
    assert_same(expected, run_graph(graph, inputs), EXACT, graph.signature)
