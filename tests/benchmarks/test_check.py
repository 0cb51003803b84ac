"""The check of kept figures: what it calls a regression, and what it says. Nothing is timed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.check import CHECKS, Check, run, table


def _check(now: Callable[[], float], limit: float = 1.5, place: tuple[str, ...] = ("a",)) -> Check:
    return Check("a figure", "kept", place, limit, now)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kept.json").write_text(json.dumps({"results": {"a": 2.0, "in": {"b": 1.0}}}))
    return tmp_path


@pytest.mark.parametrize(("now", "holds"), [(1.0, True), (3.0, True), (3.01, False)])
def test_a_figure_may_grow_by_its_limit(folder: Path, now: float, holds: bool) -> None:
    (found,) = run([_check(lambda: now)], folder)
    assert (found.problem == "") is holds
    assert ("REGRESSION" in table([found])) is not holds


def test_a_regression_is_one_line(folder: Path) -> None:
    assert table(run([_check(lambda: 4.0)], folder)).splitlines() == [
        "figure    kept   now    times  limit",
        "a figure  2.000  4.000  2.00   1.50   REGRESSION",
        "a figure is 4.000 and was 2.000: 2.00 times as much, above the limit of 1.50",
    ]


def test_what_cannot_be_measured_is_a_problem(folder: Path) -> None:
    def fails() -> float:
        raise RuntimeError("no compiler\nand more")

    (found,) = run([_check(fails)], folder)
    assert found.problem == "a figure was not measured: RuntimeError: no compiler"


def test_what_was_not_kept_is_shown_and_is_none(folder: Path) -> None:
    places = [("b",), ("in", "c")]
    found = run([_check(lambda: 9.0, place=place) for place in places], folder)
    assert [f.problem for f in found] == ["", ""]
    assert [f.row[-1] for f in found] == ["not kept", "not kept"]
    (found_below,) = run([_check(lambda: 1.0, place=("in", "b"))], folder)
    assert found_below.kept == 1.0
    (without,) = run([_check(lambda: 1.0)], folder / "nowhere")
    assert without.kept is None


def test_the_time_is_bounded(folder: Path) -> None:
    clock = itertools.count(0.0, 4.0)
    found = run([_check(lambda: 2.0)] * 4, folder, seconds=10.0, clock=lambda: next(clock))
    assert [f.problem for f in found] == [
        "",
        "",
        *["a figure was not measured: the time was up"] * 2,
    ]


def test_names_differ_and_kept_figures_are_found() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    missing = {check.name for check in CHECKS if check.kept() is None}
    assert not any(name.startswith(("passes", "memory", "verification")) for name in missing)
