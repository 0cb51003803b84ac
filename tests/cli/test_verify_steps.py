"""`graphopt verify` also compares what a backend and the runtime make of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli.main import app
from tests.support import faults

NET = "tests/support/faulty_example.py:example"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("COLUMNS", "200")
    faults.with_backends(monkeypatch.setattr)


def verify(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ("verify", *arguments))
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def test_a_wrong_backend_is_named() -> None:
    found = json.loads(
        verify(NET, "-p", "cleanup", "--backend", "wrong_backward", "--json", code=1).stdout
    )
    assert (found["ok"], found["first_bad"]) == (False, "backend wrong_backward")
    assert [s["result"] for s in found["stages"][:2]] == ["bit-equal", "bit-equal"]


def test_forms_of_a_right_step_are_shown() -> None:
    out = verify(NET, "-p", "kfac{interval=2}", "--backend", "eager").stdout
    assert "backend eager" in out
    assert "part kfac, with and without results of its own" in out


def test_a_wrong_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = faults.place("kfac.statistics")
    monkeypatch.setattr(statistics, "keeping", faults.swap_in(statistics.keeping))
    out = verify(NET, "-p", "kfac{interval=2}", code=1).stdout
    assert "first out of its class: part kfac" in out


def test_a_text_has_no_steps(tmp_path: Path) -> None:
    path = tmp_path / "a.gopt"
    path.write_text((Path("tests/golden/cleanup.before.gopt")).read_text())
    error = verify(str(path), "-p", "cleanup", "--backend", "eager", code=2).stderr
    assert "a .gopt file has no model whose steps a backend could run" in error
