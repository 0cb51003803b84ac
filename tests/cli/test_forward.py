"""The forward level on the command line: what forward calls, and weights in factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.graph import Level
from graphopt.text import parse_graph, print_graph

ROOT = Path(__file__).parents[2]
MIXER = "tests/low_rank/for_cli.py:mixer"
SPEC = "low_rank{smallest=32,gain=0.01,cost=roofline}"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


def _graphopt(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def test_show_prints_the_forward_and_what_becomes_of_it(tmp_path: Path) -> None:
    text = _graphopt("show", MIXER, "--level", "forward").stdout
    graph = parse_graph(text)
    assert graph.level is Level.FORWARD
    assert print_graph(graph) == text
    assert "torch._C._nn.linear(%rows, %mix_weight, %mix_bias)" in text
    assert "Tensor.transpose(" in text
    rewritten = _graphopt("show", MIXER, "--level", "forward", "-p", SPEC).stdout
    assert "graphopt.structured_matmul.default(" in rewritten
    file = tmp_path / "forward.gopt"
    file.write_text(text)
    again = _graphopt("show", str(file), "--level", "forward", "--json").stdout
    assert json.loads(again)["text"] == text
    stderr = _graphopt("show", MIXER, "--level", "middle", code=2).stderr
    assert "--level middle is unknown" in stderr


def test_the_joint_graph_is_derived_from_the_rewritten_forward() -> None:
    text = _graphopt("show", MIXER, "-p", f"{SPEC},cleanup", "--text").stdout
    assert parse_graph(text).level is Level.JOINT
    assert 'grad "parametrizations.left.original0"' in text
    assert 'grad "left"' not in text
    assert "structured" not in text
    difference = _graphopt("diff", MIXER, "", SPEC, code=1).stdout
    assert "left" in difference


def test_plan_has_form_time_error_and_memory_of_each_weight() -> None:
    said = _graphopt("plan", MIXER, "-p", SPEC).stdout
    assert "toeplitz" in said
    assert "dense.weight stays dense: full-rank" in said
    answer = json.loads(_graphopt("plan", MIXER, "-p", SPEC, "--json").stdout)
    rows = {(row["site"], row["form"]): row for row in answer["weights"]}
    assert rows["left", "flat, rank 2"]["why"] == "chosen"
    assert rows["left", "flat, rank 2"]["numbers"] == 4 * 64
    assert rows["left", "dense"]["seconds"] > 0
    assert {site["reason"] for site in answer["declined"]} == {"small", "full-rank"}
    stderr = _graphopt("plan", MIXER, "-p", SPEC, "--mesh", "dp=2", code=2).stderr
    assert "--mesh has no meaning for weights" in stderr
