"""Traces keep to the published format; no trace processor is asked, as no package brings one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.render.perfetto import trace_events
from graphopt.simulate.trace import Span
from tests.support.trace_events import problems

ROOT = Path(__file__).parents[2]
SMALL = "examples/small.py:make"
ON = ("--device", "h100")
STAGES = ("-p", "partition{stages=2}", "--mesh", "pp=2", *ON)
COMMANDS = {
    "simulate": ("simulate", SMALL, "--mesh", "dp=64", "--cluster", "summit", *ON),
    "stages": ("plan", SMALL, *STAGES),
    "report": ("report", SMALL, "--mesh", "dp=8", *ON),
    "report of stages": ("report", SMALL, *STAGES),
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("traces") / "trace.json"
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, command in COMMANDS.items():
            result = CliRunner().invoke(app, [*command, "--trace", str(file)])
            assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
            found[name] = json.loads(file.read_text(), parse_constant=pytest.fail)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_traces_of_commands_keep_to_the_format(
    name: str, traces: dict[str, dict[str, Any]]
) -> None:
    trace = traces[name]
    assert problems(trace) == []
    assert {event["ph"] for event in trace["traceEvents"]} <= {"M", "X", "C"}
    assert any(event["ph"] == "X" and event["dur"] > 0 for event in trace["traceEvents"])


def test_processes_are_one_per_time_line(traces: dict[str, dict[str, Any]]) -> None:
    events = traces["report of stages"]["traceEvents"]
    titles = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert len(titles) == len(set(titles)) == 2
    assert any(event["ph"] == "C" for event in events)


class _Lanes:
    def __init__(self, spans: list[Span]) -> None:
        self.lanes = tuple(dict.fromkeys(span.lane for span in spans))
        self.spans = tuple(spans)


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    """On each lane one behind the other, in the order of lanes."""
    found = []
    for lane in range(draw(st.integers(1, 3))):
        at = 0.0
        for number in range(draw(st.integers(1, 4))):
            start = at + draw(st.floats(0.0, 1.0))
            at = start + draw(st.floats(0.0, 1.0))
            found.append(Span(f"lane {lane}", f"span {number}", start, at))
    return found


@given(spans(), st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 9))))
def test_any_spans_and_counters_become_a_trace(
    drawn: list[Span], values: list[tuple[float, int]]
) -> None:
    trace = trace_events(_Lanes(drawn), "drawn", {"bytes": sorted(values)})
    assert problems(json.loads(json.dumps(trace))) == []
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]  # type: ignore[attr-defined]
    assert sorted(e["ts"] + e["dur"] for e in complete) == pytest.approx(
        sorted(1e6 * span.end for span in drawn)
    )


def _first(events: list[dict[str, Any]], phase: str) -> dict[str, Any]:
    return next(event for event in events if event["ph"] == phase)


DAMAGES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "dur is -1": lambda e: _first(e, "X").update(dur=-1),
    "ts is nan": lambda e: _first(e, "X").update(ts=float("nan")),
    "it has no tid": lambda e: _first(e, "X").pop("tid"),
    "it has no name": lambda e: _first(e, "X").update(name=""),
    "phase 'Z' is unknown": lambda e: _first(e, "X").update(ph="Z"),
    "a counter without numbers": lambda e: _first(e, "C").update(args={}),
    "unknown metadata": lambda e: _first(e, "M").update(name="colour"),
    "overlaps": lambda e: e.extend(
        [{**_first(e, "X"), "ts": 1e12, "dur": 2.0}, {**_first(e, "X"), "ts": 1e12 + 1, "dur": 2.0}]
    ),
    "comes behind what is later": lambda e: e.reverse(),
    "has no name": lambda e: e.remove(_first(e, "M")),
    "has several names": lambda e: e.append(copy.deepcopy(_first(e, "M"))),
    "has no end": lambda e: e.append({**_first(e, "X"), "ph": "s", "id": 1, "ts": 1e12}),
    "f behind nothing": lambda e: e.append({**_first(e, "X"), "ph": "f", "id": 1, "ts": 1e12}),
    "ends and has not begun": lambda e: e.append({**_first(e, "X"), "ph": "E", "ts": 1e12}),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_what_breaks_a_rule_is_found(said: str, traces: dict[str, dict[str, Any]]) -> None:
    trace = copy.deepcopy(traces["report of stages"])
    DAMAGES[said](trace["traceEvents"])
    assert any(said in problem for problem in problems(trace))
