"""Known plans, known networks and bad input of the planner of gradient groups."""

from __future__ import annotations

import math
import time

import pytest

from graphopt.errors import ArgumentError
from graphopt.grouping import search
from graphopt.grouping.baselines import (
    MIB,
    best_uniform,
    capped,
    ddp_default,
    finish_time,
    mg_wfbp,
    one_group,
    per_layer,
)
from graphopt.grouping.planner import DELTA_EXPOSED, plan
from graphopt.network.curve import Curve
from graphopt.plan.grouping import Ready
from tests.grouping.earliest import earliest_finish
from tests.support.gradient_profiles import NETWORKS

# Seconds per message and per byte; the first five are what MG-WFBP's authors ship as fits.
LINKS = {
    "16 nodes 10GbE": (9.08e-4, 7.40e-10),
    "16 nodes 56 Gb IB": (2.36e-4, 4.06e-10),
    "8 nodes": (5.23e-4, 8.57e-10),
    "8 nodes IB": (9.75e-5, 3.06e-10),
    "4 nodes": (4.20e-5, 2.06e-10),
    "2 ranks 1GbE": (5e-4, 8e-9),
}
RATES = (2e12, 1e13, 5e13)  # operations per second


def _even(count: int, size: int, gap: float) -> list[Ready]:
    return [Ready(f"p{i}", size, (i + 1) * gap, module=f"m{i // 2}") for i in range(count)]


def test_nothing_to_reduce() -> None:
    empty = plan([], Curve.affine(1e-3, 1e-9), 2.0, link="l", times="roofline", world=4)
    assert (empty.groups, empty.candidates) == ((), ())
    assert (empty.finish, empty.exposed, empty.world) == (0.0, 0.0, 4)


def test_one_gradient() -> None:
    (group,) = plan([Ready("w", 1000, 2.0)], Curve.affine(1.0, 1e-3), 2.0).groups
    assert (group.names, group.ready) == (("w",), 2.0)
    assert group.finish == pytest.approx(4.0)


def test_mg_wfbp_puts_everything_in_one_group_where_gaps_are_shorter_than_a_start_up() -> None:
    ready, cost = _even(160, 100_000, 1e-4), Curve.affine(2e-4, 2e-10)
    assert len(mg_wfbp(ready, cost)) == 1
    chosen = plan(ready, cost, ready[-1].seconds)
    (collapsed,) = (c for c in chosen.candidates if c.name == "mg-wfbp")
    assert collapsed.finish - chosen.backward > 5 * chosen.exposed


def test_mg_wfbp_keeps_apart_what_is_free_to_go_first() -> None:
    ready = _even(5, 1000, 1.0)  # a second between gradients that take a millisecond
    assert [g.names for g in mg_wfbp(ready, Curve.affine(1e-3, 1e-9))] == [(r.name,) for r in ready]


def test_ddp_fills_a_small_bucket_first_and_closes_at_the_cap_or_above() -> None:
    ready = _even(80, 600 * 1024, 1.0)
    sizes = [g.bytes for g in ddp_default(ready)]
    first, second = 2, math.ceil(25 * MIB / (600 * 1024))  # 1.17 MiB and just above 25 MiB
    assert sizes == [n * 600 * 1024 for n in (first, second, 80 - first - second)]
    assert capped(ready, (25 * MIB,))[0].bytes == second * 600 * 1024


def test_ddp_fills_each_kind_on_its_own() -> None:
    ready = [Ready(f"p{i}", MIB // 2, i + 1.0, f"k{i % 2}") for i in range(8)]
    # Two half MiB close the first bucket of each kind; the rest stays open until the end.
    assert [g.names for g in ddp_default(ready)] == [
        ("p0", "p2"),
        ("p1", "p3"),
        ("p4", "p6"),
        ("p5", "p7"),
    ]
    assert [g.names for g in one_group(ready)] == [
        ("p0", "p2", "p4", "p6"),
        ("p1", "p3", "p5", "p7"),
    ]


def test_layers_are_modules_and_a_cap_has_its_name() -> None:
    ready = [Ready("a.w", 1, 1.0), Ready("b.w", 1, 2.0), Ready("a.b", 1, 3.0)]
    assert [g.names for g in per_layer(ready)] == [("b.w",), ("a.w", "a.b")]
    assert [len(g.names) for g in per_layer(_even(5, 1, 1.0))] == [2, 2, 1]
    assert best_uniform(_even(9, MIB, 1.0), Curve.affine(0.1, 1e-6))[0] == "uniform 1 MiB"
    assert best_uniform(_even(9, MIB, 1e-9), Curve.affine(0.1, 1e-9))[0] == "uniform 64 MiB"


def test_kinds_share_one_channel_and_never_a_group() -> None:
    ready = [Ready(f"p{i}", 1000, 1.0 + i // 2, f"k{i % 2}") for i in range(10)]
    chosen = plan(ready, Curve.affine(0.5, 1e-3), 5.0)
    clock = 0.0
    for group in chosen.groups:
        clock = max(clock, group.ready) + 0.5 + group.bytes * 1e-3
        assert group.finish == pytest.approx(clock)
    assert {g.kind for g in chosen.groups} == {"k0", "k1"}


@pytest.mark.parametrize("kinds", [1, 2])
def test_a_thousand_gradients_take_less_than_a_second(kinds: int) -> None:
    ready = [
        Ready(f"p{i}", (64, 9_000, 600_000)[i % 3], 2e-4 * (i + 1), f"k{i * 7 % 11 % kinds}")
        for i in range(1000)
    ]
    cost = Curve(((0, 3e-4), (65_536, 3.2e-4), (65_537, 6e-4), (4e6, 3e-3), (1e8, 8e-2)))
    begin = time.process_time()
    chosen = plan(ready, cost, 0.2)
    assert time.process_time() - begin < 1.0
    assert 2 <= len(chosen.groups) <= 60
    assert chosen.groups[-1].bytes < sum(r.bytes for r in ready) / 4  # a short tail
    assert chosen.bound <= chosen.finish <= min(c.finish for c in chosen.candidates)


@pytest.mark.parametrize("kinds", [1, 2])
def test_too_many_gradients_are_paired_first(monkeypatch: pytest.MonkeyPatch, kinds: int) -> None:
    ready = [Ready(f"p{i}", 1000 + i, 1e-3 * (i + 1), f"k{i % kinds}") for i in range(60)]
    cost = Curve.affine(5e-3, 1e-7)
    exact = earliest_finish(ready, cost)
    monkeypatch.setattr(search, "MOST_GRADIENTS", 10)
    chosen = plan(ready, cost, 0.06)
    assert exact <= chosen.finish <= min(c.finish for c in chosen.candidates)
    assert sorted(n for g in chosen.groups for n in g.names) == sorted(r.name for r in ready)


@pytest.mark.parametrize(
    ("ready", "backward", "says"),
    [
        ([Ready("w", 4, 1.0), Ready("w", 4, 2.0)], 2.0, "twice"),
        ([Ready("w", -4, 1.0)], 2.0, "-4 bytes"),
        ([Ready("w", 4, math.nan)], 2.0, "nan"),
        ([Ready("w", 4, -1.0)], 2.0, "-1.0"),
        ([Ready("w", 4, 1.0)], math.inf, "inf"),
    ],
)
def test_input_that_means_nothing(ready: list[Ready], backward: float, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        plan(ready, Curve.affine(1.0, 1.0), backward)


def test_a_cost_that_falls_with_size_is_refused() -> None:
    with pytest.raises(ArgumentError, match="never falls"):
        plan(_even(4, 100, 1.0), lambda size: 1.0 / (1.0 + size), 4.0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 25_557_032),
        ("densenet121", 7_978_856),
        ("fc_densenet103", 9_322_091),  # the paper rounds: 9.4 M
        ("gpt2_small", 124_439_808),
    ],
)
def test_profiles_have_the_published_sizes(name: str, parameters: int) -> None:
    network, batch = NETWORKS[name]
    ready, backward = network().profile(batch, RATES[0])
    assert network().parameters == parameters == sum(r.bytes for r in ready) // 4
    assert ready == sorted(ready, key=lambda r: r.seconds)
    assert ready[-1].seconds == backward


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_exposed_time_is_near_the_bound_where_backward_is_long(name: str, link: str) -> None:
    network, batch = NETWORKS[name]
    ready, backward = network().profile(batch, RATES[0])
    chosen = plan(ready, Curve.affine(*LINKS[link]), backward)
    assert chosen.exposed <= 1.06 * (chosen.bound - backward)


@pytest.mark.parametrize("name", NETWORKS)
def test_where_the_bound_is_far_away_no_other_plan_is_nearer(name: str) -> None:
    """The bound counts one start-up; it is loose where messages take about as long as backward."""
    network, batch = NETWORKS[name]
    near = 0
    for rate in RATES:
        ready, backward = network().profile(batch, rate)
        for link in LINKS.values():
            cost = Curve.affine(*link)
            chosen = plan(ready, cost, backward)
            best = earliest_finish(ready, cost) - backward
            assert chosen.exposed <= (1 + DELTA_EXPOSED) * best * (1 + 1e-9)
            near += chosen.exposed <= 1.06 * (chosen.bound - backward)
            assert finish_time(ddp_default(ready), cost) >= chosen.finish
    assert near >= 12  # of 18
