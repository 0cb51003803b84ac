"""`graphopt plan` of a pass that makes stages, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli.main import app

ROOT = Path(__file__).parents[2]
NET = "tests/support/models_for_cli.py:net"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


def _run(*arguments: str) -> Result:
    named = () if "--device" in arguments else ("--device", "cpu")
    return CliRunner().invoke(app, ["plan", *arguments, *named])


def _refusal(*arguments: str) -> str:
    result = _run(*arguments)
    assert result.exit_code != 0
    return result.stderr


def test_stages_by_module_with_times_memory_cuts_and_certificate() -> None:
    result = _run(NET, "-p", "cleanup,partition{stages=4}", "--mesh", "pp=4")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "models_for_cli:net: 4 stages on 4 ranks"
    titles = ("stage", "rank", "modules", "parameters", "forward ms", "backward ms", "memory")
    assert " ".join(lines[2].split()) == " ".join((*titles, "in flight"))
    rows = [line.split()[:3] for line in lines[3:7]]
    assert [row[:2] for row in rows] == [[str(n), str(n)] for n in range(4)]
    assert rows[0][2] == "stem"
    for start in (
        "cut",
        "0 > 1",
        "0 < 1",
        "2 > 3",
        "step",
        "bubble",
        "certificate",
        "times",
        "link",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert "no other stages have less (exact search)" in result.stdout
    assert "16 micro-batches" in result.stdout


def test_json_chart_and_trace(tmp_path: Path) -> None:
    plot, trace = tmp_path / "step.svg", tmp_path / "step.json"
    spec = "partition{schedule=interleaved,microbatches=4}"
    result = _run(
        *(NET, "-p", spec, "--mesh", "pp=2", "--link", "dgx-h100", "--json"),
        *("--plot", str(plot), "--trace", str(trace)),
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout, parse_constant=pytest.fail)
    assert answer["schema"] == "graphopt.plan/1"
    assert [stage["rank"] for stage in answer["stages"]] == [0, 1, 0, 1]
    assert answer["link"] == "dgx-h100"
    assert 0 < answer["bubble"] < 1
    assert Xml.fromstring(plot.read_text()).tag.endswith("svg")
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"rank 0", "rank 1"} <= names
    last = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
    assert last == pytest.approx(1e6 * answer["step"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "partition"), "there are no stages to plan: the mesh has one rank along pp"),
        (("-p", "partition{stages=99}"), "99 stages are more than the"),
        (("-p", "partition{memory=1}", "--mesh", "pp=2"), "more than its limit of 1"),
        (("-p", "partition", "--mesh", "pp=2", "--flops", "1e12"), "--flops has no meaning"),
        (("-p", "partition", "--mesh", "pp=2", "--accuracy"), "--accuracy has no meaning"),
        (("-p", "cleanup", "--mesh", "dp=2", "--trace", "x"), "--trace is about stages"),
        (("-p", "partition", "--mesh", "pp=2", "--plot", "/no/such/x"), "cannot be written"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    assert message in _refusal(NET, *arguments)
