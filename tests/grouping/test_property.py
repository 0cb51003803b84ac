"""The planner of gradient groups against everything that can be tried on small instances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.grouping import planner
from graphopt.grouping.baselines import finish_time, group_of
from graphopt.grouping.planner import DELTA, plan
from graphopt.network.curve import Curve
from graphopt.plan.grouping import Ready
from tests.grouping.earliest import earliest_finish

SIZES = st.integers(0, 4000)
GAPS = st.sampled_from([0.0, 0.5, 1.0, 3.0, 40.0])


@st.composite
def gradients(draw: st.DrawFn, most: int = 6, kinds: int = 1) -> list[Ready]:
    rows = draw(
        st.lists(st.tuples(SIZES, GAPS, st.integers(0, kinds - 1)), min_size=1, max_size=most)
    )
    times = accumulate(gap for _, gap, _ in rows)
    return [
        Ready(f"p{i}", size, time, f"kind{kind}", f"m{i // 2}")
        for i, ((size, _, kind), time) in enumerate(zip(rows, times, strict=True))
    ]


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Any measured curve: steps, flat parts and jumps of the protocol, and laying out included."""
    points = draw(
        st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 9)), min_size=1, max_size=6)
    )
    sizes = accumulate(size for size, _ in points)
    times = accumulate(more for _, more in points)
    joining = draw(st.sampled_from([0.0, 1e-3, 0.05]))
    return Curve(tuple(zip(sizes, times, strict=True)), joining=joining)


affine = st.builds(Curve.affine, st.floats(0, 9), st.floats(0, 0.01))


def _partitions(items: Sequence[Ready]) -> Iterator[list[list[Ready]]]:
    if not items:
        yield []
        return
    for rest in _partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def _contiguous(items: Sequence[Ready]) -> Iterator[list[Sequence[Ready]]]:
    if not items:
        yield []
    for end in range(1, len(items) + 1):
        for rest in _contiguous(items[end:]):
            yield [items[:end], *rest]


def _pure(parts: Sequence[Sequence[Ready]]) -> bool:
    return all(len({r.kind for r in part}) == 1 for part in parts)


def _best_order(parts: Sequence[Sequence[Ready]], cost: Curve) -> float:
    return min(finish_time(order, cost) for order in permutations(map(group_of, parts)))


@pytest.mark.hypothesis  # examples are generated within
@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_no_set_partition_in_any_order_is_faster_on_an_affine_link(kinds: int) -> None:
    @given(gradients(most=6 if kinds == 1 else 5, kinds=kinds), affine)
    @settings(max_examples=50)
    def check(ready: list[Ready], cost: Curve) -> None:
        brute = min(_best_order(parts, cost) for parts in _partitions(ready) if _pure(parts))
        assert earliest_finish(ready, cost) == pytest.approx(brute, rel=1e-12)

    check()


@given(gradients(most=8), curves())
def test_no_contiguous_plan_is_faster_on_any_curve(ready: list[Ready], cost: Curve) -> None:
    brute = min(finish_time(map(group_of, parts), cost) for parts in _contiguous(ready))
    assert earliest_finish(ready, cost) == brute  # to the last bit
    assert plan(ready, cost, 0.0).finish <= brute * (1 + DELTA)


@given(gradients(most=6, kinds=2), curves())
@settings(max_examples=50)
def test_two_kinds_share_the_channel_optimally(ready: list[Ready], cost: Curve) -> None:
    one, two = ([r for r in ready if r.kind == kind] for kind in ("kind0", "kind1"))
    brute = min(
        finish_time(sorted(map(group_of, [*a, *b]), key=lambda g: g.ready), cost)
        for a in _contiguous(one)
        for b in _contiguous(two)
    )
    assert earliest_finish(ready, cost) == pytest.approx(brute, rel=1e-12)
    assert plan(ready, cost, 0.0).finish <= brute * (1 + DELTA) * (1 + 1e-12)


@given(gradients(most=8), curves(), st.floats(0, 2))
def test_no_plan_within_the_tolerance_has_fewer_groups(
    ready: list[Ready], cost: Curve, share: float
) -> None:
    backward = ready[-1].seconds * share
    chosen = plan(ready, cost, backward)
    best = earliest_finish(ready, cost)
    slack = planner._slack(best, backward)
    assert 0 <= slack <= DELTA * best
    limit = max(best, min(best + slack, *(c.finish for c in chosen.candidates)))
    assert chosen.finish <= limit
    counts = [
        len(parts)
        for parts in _contiguous(ready)
        if finish_time(map(group_of, parts), cost) <= limit
    ]
    assert len(chosen.groups) == min(counts)


@given(gradients(most=30, kinds=3), curves())
def test_a_plan_is_sound_and_no_candidate_beats_it(ready: list[Ready], cost: Curve) -> None:
    chosen = plan(ready[::-1], cost, ready[-1].seconds)
    by_name = {r.name: r for r in ready}
    assert sorted(n for g in chosen.groups for n in g.names) == sorted(by_name)
    for group in chosen.groups:
        members = [by_name[name] for name in group.names]
        assert {r.kind for r in members} == {group.kind}
        assert group.bytes == sum(r.bytes for r in members)
        assert group.ready == max(r.seconds for r in members)
    assert chosen.groups[-1].finish == chosen.finish == finish_time(chosen.groups, cost)
    assert chosen.finish <= min(c.finish for c in chosen.candidates)
    for candidate in chosen.candidates:
        assert sum(candidate.sizes) == sum(r.bytes for r in ready)


@given(gradients(most=20, kinds=2), curves(), st.floats(0, 1))
def test_a_faster_link_never_finishes_later(ready: list[Ready], cost: Curve, share: float) -> None:
    faster = Curve(tuple((size, time * share) for size, time in cost.points))
    slow, fast = earliest_finish(ready, cost), earliest_finish(ready, faster)
    assert fast <= slow * (1 + 1e-12)
    assert plan(ready, faster, 0.0).finish <= slow * (1 + DELTA) * (1 + 1e-12)


@given(gradients(most=20, kinds=2), affine)
def test_the_bound_is_below_the_best_finish_on_sub_additive_links(
    ready: list[Ready], cost: Curve
) -> None:
    best = earliest_finish(ready, cost)
    assert planner.lower_bound(ready, cost) <= best * (1 + 1e-12)
    assert plan(ready, cost, 0.0).bound <= plan(ready, cost, 0.0).finish


@given(gradients(most=12, kinds=2), curves())
def test_a_curve_and_a_function_of_the_same_values_give_the_same_plan(
    ready: list[Ready], cost: Curve
) -> None:
    # A function knows nothing of laying out.
    cost = replace(cost, joining=0.0)
    assert plan(ready, lambda size: cost(size), 1.0) == plan(ready, cost, 1.0)
