"""The ladder of the overlap benchmark: its table, its picture, and what it does without data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from benchmarks import ladder, overlap, overlap_variants
from benchmarks.bars import Bar, bar_chart

SVG = "{http://www.w3.org/2000/svg}"
ABOUT = {"torch": "2.13.0", "machine": "some CPU, 2 cores", "date": "2026-01-02T03:04:05"}


def over(*medians: float) -> dict[str, Any]:
    names = (*ladder.RUNGS, "ddp cap 1 MiB")
    found = {
        name: {"median": value, "low": value - 0.02, "high": value + 0.03}
        for name, value in zip(names, medians, strict=False)
    }
    return {"over ddp default": found}


def test_names_are_those_of_the_benchmark() -> None:
    assert list(ladder.RUNGS) == [*overlap_variants.OURS, *overlap.BESTS]


def test_rungs_in_order_and_runs_without_one_left_out() -> None:
    values = (0.9, 0.85, 0.8, 0.95, 0.94, 0.93)
    rungs = ladder.ladder({"mlp": over(*values, 1.1), "old": over(0.9)})
    assert list(rungs) == ["mlp"]
    assert [bar.value for bar in rungs["mlp"]] == [1.0, *values]
    lines = ladder.table(rungs).splitlines()
    assert lines[0] == "mlp"
    few = {name: over(0.9)["over ddp default"][ladder.NEEDED[0]] for name in ladder.NEEDED}
    assert len(ladder.ladder({"mlp": {"over ddp default": few}})["mlp"]) == 4
    assert lines[2].split()[-3:] == ["0.900", "[0.880,", "0.930]"]


def test_picture_is_written_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ladder, "RESULTS", tmp_path)
    monkeypatch.setattr(ladder, "IMAGE", tmp_path / "images" / "overlap.svg")
    record = {**ABOUT, "results": {"mlp, 1 Gbit/s": over(0.9, 0.85, 0.95, 0.94, 0.93, 0.92)}}
    (tmp_path / "overlap.json").write_text(json.dumps(record))
    ladder.main()
    assert "0.850" in capsys.readouterr().out
    words = [t.text for t in Xml.parse(ladder.IMAGE).getroot().iter(f"{SVG}text")]
    assert "0.850 (0.83 to 0.88)" in words
    assert "mlp, 1 Gbit/s" in words


def test_results_without_the_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "RESULTS", tmp_path)
    (tmp_path / "overlap.json").write_text(json.dumps({"results": {"old": over()}}))
    with pytest.raises(SystemExit, match=r"no run in overlap\.json has the variant"):
        ladder.main()


def test_the_best_is_chosen_on_other_blocks_than_it_is_measured_on() -> None:
    times = {
        overlap_variants.PLAIN: [0.0] * 4,
        "a": [1.0, 9.0, 1.0, 9.0],
        "b": [2.0, 3.0, 2.0, 3.0],
    }
    # Of the even blocks b is chosen, as it is better on the odd ones; and the other way round.
    assert overlap._best(times, ["a", "b"]) == [2.0, 9.0, 2.0, 9.0]


def test_every_peer_counts_and_nothing_else() -> None:
    names = [
        overlap_variants.PLAIN,
        *overlap_variants.OURS,
        *overlap.BESTS,
        overlap_variants.DEFAULT,
        *overlap.PEERS,
    ]
    found = overlap._peers(dict.fromkeys(names))
    assert found == [overlap_variants.DEFAULT, *overlap.PEERS]


# -- bars ------------------------------------------------------------------------------------------


def bars(svg: str) -> list[Xml.Element]:
    return [r for r in Xml.fromstring(svg).iter(f"{SVG}rect") if r.get("width") != "100%"]


def test_bars_are_as_long_as_their_values() -> None:
    group = [Bar("a", 1.0, 0.9, 1.1), Bar("b", 0.5, 0.5, 0.5), Bar("a", 0.0, 0.0, 0.0)]
    drawn = bars(bar_chart("t", "s", "x", {"g": group[:2], "h": group[2:]}))
    widths = [float(r.get("width", "")) for r in drawn]
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.2)
    assert widths[2] == 0
    assert drawn[0].get("fill") == drawn[2].get("fill") != drawn[1].get("fill")


def test_bars_lie_below_each_other() -> None:
    drawn = bars(bar_chart("t", "s", "x", {"g": [Bar(str(k), 1.0, 1.0, 1.0) for k in range(5)]}))
    tops = [float(r.get("y", "")) for r in drawn]
    heights = [float(r.get("height", "")) for r in drawn]
    assert all(a + h < b for a, h, b in zip(tops, heights, tops[1:], strict=False))


@pytest.mark.parametrize("highest", [0.0, 0.003, 0.61, 1.0, 1.9, 37.0])
def test_axis_ends_at_or_above_the_highest_bar(highest: float) -> None:
    svg = bar_chart("t", "s", "x", {"g": [Bar("a", highest, highest, highest)]})
    middle = [t for t in Xml.fromstring(svg).iter(f"{SVG}text") if t.get("text-anchor") == "middle"]
    ticks = [float(t.text or "") for t in middle if t.text != "x"]
    assert ticks[0] == 0
    assert highest <= ticks[-1] <= max(2 * highest, 1.0)
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bars_refuse_what_they_cannot_draw(value: float) -> None:
    with pytest.raises(ValueError, match="zero or more"):
        bar_chart("t", "s", "x", {"g": [Bar("a", value, value, value)]})


def test_no_bars() -> None:
    with pytest.raises(ValueError, match="needs bars"):
        bar_chart("t", "s", "x", {})
