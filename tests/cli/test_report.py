"""`graphopt report`: the page, the trace and the JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli.main import app

ROOT = Path(__file__).parents[2]
MLP = "tests/support/models_for_cli.py:mlp"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


def graphopt(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def test_a_page_a_trace_and_json_of_one_run(tmp_path: Path) -> None:
    page, trace = tmp_path / "report.html", tmp_path / "step.json"
    files = ("-o", str(page), "--trace", str(trace))
    result = graphopt("report", MLP, *files, "--mesh", "dp=8", "--device", "h100", "--json")
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["schema"] == "graphopt.report/1"
    assert found["passes"] == "cleanup,schedule,group_gradients"
    (line,) = found["time_lines"]
    assert {one["kind"] for one in line["activities"]} == {"forward", "backward", "message"}
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(line["activities"])
    text = page.read_text()
    for story in found["stories"]:
        assert story["name"] in text


def test_stages_of_a_pipeline_are_drawn(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = graphopt(
        "report", MLP, "-p", "partition", "--mesh", "pp=2", "--device", "h100", "-o", str(page)
    )
    assert result.stdout == f"wrote {page}\n"
    assert "2 stages" in page.read_text()


def test_a_gopt_file_has_a_report(tmp_path: Path) -> None:
    file = tmp_path / "mlp.gopt"
    file.write_text(graphopt("show", MLP, "--text").stdout)
    page = tmp_path / "report.html"
    graphopt("report", str(file), "-p", "cleanup", "-o", str(page))
    assert "<title>mlp: graphopt report</title>" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ((), "a report needs a file to go to", "-o report.html, or --json"),
        (("-o", "nowhere/r.html"), "'nowhere/r.html' cannot be written", "in a folder that exists"),
        (("--json", "--mesh", "dp=x"), "mesh dimension dp='x'", "mesh='dp=8,pp=4'"),
        (("--json", "--mesh", "dp=4", "--link", "moon", "--device", "h100"), "moon", "summit"),
        (("--json", "-p", "nothing_like_it"), "unknown pass", "lists all passes"),
        (
            ("--json", "--mesh", "dp=4"),
            "does not say what each rank computes with",
            "h100",
        ),
        (("--json", "--flops", "-1"), "is no speed of a device", "--flops 1.5e13"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_sentence_and_a_hint(
    arguments: tuple[str, ...], message: str, hint: str
) -> None:
    result = graphopt("report", MLP, *arguments, code=2)
    assert message in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
