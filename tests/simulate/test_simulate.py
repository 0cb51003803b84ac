"""The simulator on steps small enough to do by hand, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from graphopt.errors import ArgumentError
from graphopt.network.curve import Curve
from graphopt.plan.grouping import Group, Ready
from graphopt.simulate import Span, Timeline, scaling, simulate

TWO = Timeline(2.0, 4.0, (Ready("a", 10, 1.0), Ready("b", 20, 3.0)))
APART = (Group(("a",), 10, "float32 cpu"), Group(("b",), 20, "float32 cpu"))
TOGETHER = (Group(("a", "b"), 30, "float32 cpu"),)


def seconds_per_byte(slope: float) -> Callable[[float], float]:
    return lambda size: slope * size


def test_two_groups_by_hand() -> None:
    trace = simulate(TWO, APART, seconds_per_byte(0.1))
    assert trace.spans == (
        Span("compute", "forward", 0.0, 2.0),
        Span("compute", "a", 2.0, 3.0),
        Span("channel 0", "a", 3.0, 4.0),
        Span("compute", "b", 3.0, 5.0),
        Span("compute", "rest of backward", 5.0, 6.0),
        Span("channel 0", "b", 5.0, 7.0),
    )
    assert (trace.step, trace.compute_end, trace.exposed) == (7.0, 6.0, 1.0)
    assert trace.busy("compute") == 6.0
    assert trace.busy("channel") == 3.0
    assert trace.lanes == ("compute", "channel 0")


def test_a_group_waits_for_its_last_gradient() -> None:
    (span,) = (s for s in simulate(TWO, TOGETHER, lambda _: 0.5).spans if s.lane != "compute")
    assert (span.name, span.start, span.end) == ("a and 1 more", 5.0, 5.5)


def test_groups_are_served_in_order_even_if_a_later_one_is_ready() -> None:
    spans = simulate(TWO, APART[::-1], lambda _: 0.5).spans
    assert [(s.name, s.start) for s in spans if s.lane == "channel 0"] == [("b", 5.0), ("a", 5.5)]


def test_contention_slows_computation_only_while_a_channel_is_busy() -> None:
    # From 3 on the channel is busy for 1 s, in which half a second of work is done.
    trace = simulate(TWO, APART, seconds_per_byte(0.1), contention=2.0)
    found = {(s.lane, s.name): (s.start, s.end) for s in trace.spans}
    assert found["channel 0", "a"] == (3.0, 4.0)
    assert found["compute", "b"] == (3.0, 5.5)
    assert found["channel 0", "b"] == (5.5, 7.5)
    assert found["compute", "rest of backward"] == (5.5, 7.5)
    assert (trace.step, trace.exposed) == (7.5, 0.0)


def test_a_second_channel_lets_collectives_overlap() -> None:
    trace = simulate(TWO, APART, lambda _: 4.0, channels=2)
    assert trace.lanes == ("compute", "channel 0", "channel 1")
    assert (trace.step, simulate(TWO, APART, lambda _: 4.0).step) == (9.0, 11.0)


def test_negotiation_is_serial_and_comes_before_the_collective() -> None:
    trace = simulate(TWO, APART, lambda _: 0.25, negotiation=lambda group: group.bytes / 8)
    found = {(s.lane, s.name): (s.start, s.end) for s in trace.spans}
    assert found["negotiation", "a"] == (3.0, 4.25)
    assert found["channel 0", "a"] == (4.25, 4.5)
    assert found["negotiation", "b"] == (5.0, 7.5)
    assert trace.step == 7.75
    assert trace.lanes == ("compute", "negotiation", "channel 0")


def test_eleven_channels_are_listed_in_numeric_order() -> None:
    ready = tuple(Ready(f"p{i}", 1, 0.0) for i in range(11))
    groups = [Group((g.name,), 1, g.kind) for g in ready]
    trace = simulate(Timeline(0.0, 1.0, ready), groups, lambda _: 1.0, channels=11)
    assert trace.lanes == ("compute", *(f"channel {i}" for i in range(11)))


def test_a_step_without_gradients_is_its_computation() -> None:
    trace = simulate(Timeline(1.0, 2.0, ()), (), lambda _: math.nan)
    assert (trace.step, trace.exposed, trace.reduced) == (3.0, 0.0, 0.0)


# -- many sizes ------------------------------------------------------------------------------------


def test_scaling_by_hand() -> None:
    points = scaling(
        TWO,
        lambda world, cost: APART if world == 2 else TOGETHER,
        lambda world: seconds_per_byte(0.05 * world),
        (1, 2, 4),
    )
    assert [(p.world, p.groups, p.step, p.exposed) for p in points] == [
        (1, 0, 6.0, 0.0),
        (2, 2, 7.0, 1.0),
        (4, 1, 11.0, 5.0),
    ]
    assert [p.efficiency for p in points] == [1.0, 6 / 7, 6 / 11]


def test_a_late_rank_costs_efficiency_without_any_communication_time() -> None:
    (point,) = scaling(
        TWO, lambda *_: APART, lambda _: Curve.affine(0, 0), (8,), delay=lambda world: world / 4
    )
    assert math.isclose(point.step, 8.0)
    assert math.isclose(point.efficiency, 0.75)


def test_one_rank_neither_negotiates_nor_waits() -> None:
    def never(*_: object) -> float:
        raise AssertionError

    (point,) = scaling(TWO, never, never, (1,), delay=never, negotiation=never)  # type: ignore
    assert (point.step, point.efficiency) == (6.0, 1.0)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (APART[:1], "'b' is in no group"),
        ((*APART, APART[0]), "'a' is in two groups"),
        ((*APART, Group(("c",), 1, "float32 cpu")), "'c' is in a group, but never ready"),
        ((*APART, Group((), 0, "float32 cpu")), "no gradient"),
    ],
)
def test_groups_must_partition_the_gradients(groups: tuple[Group, ...], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        simulate(TWO, groups, lambda _: 1.0)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_costs(value: float) -> None:
    with pytest.raises(ArgumentError, match="collective of 10 bytes cannot take"):
        simulate(TWO, APART, lambda _: value)
    with pytest.raises(ArgumentError, match="negotiation of 10 bytes cannot take"):
        simulate(TWO, APART, lambda _: 1.0, negotiation=lambda _: value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"channels": 0}, "0 channels"),
        ({"contention": 0.5}, "factor 0.5"),
        ({"contention": math.nan}, "factor nan"),
    ],
)
def test_options_out_of_range(options: dict[str, float], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        simulate(TWO, APART, lambda _: 1.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forward", "backward", "ready", "says"),
    [
        (-1.0, 1.0, (), "forward pass cannot take"),
        (1.0, math.inf, (), "backward pass cannot take"),
        (1.0, 1.0, (Ready("a", 1, 2.0),), "'a' is ready after 2.0 s"),
        (1.0, 1.0, (Ready("a", 1, math.nan),), "'a' is ready after nan s"),
        (1.0, 1.0, (Ready("a", 1, 0.5), Ready("a", 1, 0.7)), "'a' has two gradients"),
    ],
)
def test_impossible_timelines(
    forward: float, backward: float, ready: tuple[Ready, ...], says: str
) -> None:
    with pytest.raises(ArgumentError, match=says):
        Timeline(forward, backward, ready)


def test_impossible_worlds() -> None:
    def run(timeline: Timeline, world: int, late: float = 0.0) -> None:
        scaling(timeline, lambda *_: APART, lambda _: lambda _: 1.0, (world,), delay=lambda _: late)

    with pytest.raises(ArgumentError, match="no world of 0 ranks"):
        run(TWO, 0)
    with pytest.raises(ArgumentError, match=r"cannot be -1.0 s late"):
        run(TWO, 2, -1.0)
    with pytest.raises(ArgumentError, match="without computation"):
        run(Timeline(0.0, 0.0, ()), 2)
