"""How a plan of gradient groups is shown."""

from __future__ import annotations

import pytest
from rich.console import Console

from graphopt.plan.grouping import Candidate, Group, Grouping
from graphopt.render.grouping import GROUPS_SHOWN, above_bound, grouping_view

PLAN = Grouping(
    groups=(
        Group(("head.bias", "head.weight"), 4_020, "float32 cpu", 0.001, 0.002),
        Group(("layers[0].weight",), 2_000_000, "float32 cpu", 0.010, 0.0123),
    ),
    backward=0.010,
    finish=0.0123,
    bound=0.012,
    candidates=(
        Candidate("one group", (2_004_020,), 0.0150),
        Candidate("ddp default", (2_000_000, 4_020), 0.0130),
    ),
    link="10gbe: auto over 64 GPUs",
    times="roofline",
    world=64,
)


def text(grouping: Grouping, width: int = 120, note: str = "") -> str:
    console = Console(width=width, record=True, color_system=None, file=None)
    with console.capture() as captured:
        console.print(grouping_view(grouping, link_note=note))
    return captured.get()


def lines(grouping: Grouping) -> list[list[str]]:
    return [line.split() for line in text(grouping).splitlines()]


def test_groups_are_listed_in_order_with_their_times() -> None:
    assert ["1", "2", "4.02", "kB", "head.bias", "head.weight", "1.000", "2.000"] in lines(PLAN)
    # A name with brackets is no markup.
    row = ["2", "1", "2", "MB", "layers[0].weight", "layers[0].weight", "10.000", "12.300"]
    assert row in lines(PLAN)


def test_candidates_follow_the_plan_and_are_sorted_by_finish() -> None:
    rows = lines(PLAN)
    start = rows.index(["plan", "groups", "finish", "ms", "exposed", "ms"])
    assert rows[start + 1 : start + 4] == [
        ["this", "plan", "2", "12.300", "2.300"],
        ["ddp", "default", "2", "13.000", "3.000"],
        ["one", "group", "1", "15.000", "5.000"],
    ]


def test_certificate_and_sources_are_named() -> None:
    out = text(PLAN, width=300, note="by default")
    assert "12.000 ms: no contiguous groups can finish earlier" in out
    assert "this plan is 2.50 % above" in out
    assert "compute: roofline" in out
    assert "10gbe: auto over 64 GPUs, 64 ranks (by default)" in out


def test_above_bound_is_a_fraction_and_never_negative() -> None:
    assert above_bound(PLAN) == pytest.approx(0.025)
    empty = Grouping((), backward=0.0, finish=0.0, bound=0.0)
    assert above_bound(empty) == 0.0


def test_kinds_are_shown_where_they_differ() -> None:
    assert "float32 cpu" not in text(PLAN)
    other = Group(("scale",), 8, "float64 cpu", 0.011, 0.0124)
    mixed = Grouping((*PLAN.groups, other), backward=0.01, finish=0.0124, bound=0.012)
    assert text(mixed).count("float32 cpu") == 2
    assert text(mixed).count("float64 cpu") == 1


def test_many_groups_are_cut_and_the_rest_is_counted() -> None:
    groups = tuple(Group((f"p{i}",), 4, "float32 cpu") for i in range(GROUPS_SHOWN + 3))
    out = text(Grouping(groups, backward=1.0, finish=1.0, bound=1.0))
    assert f"p{GROUPS_SHOWN - 1} " in out
    assert f"p{GROUPS_SHOWN} " not in out
    assert "and 3 more, which --json shows" in out


def test_a_narrow_terminal_keeps_every_figure() -> None:
    out = text(PLAN, width=60)
    assert "12.300" in out
    assert max(map(len, out.splitlines())) <= 60
