"""Warnings come from the user's line, and what takes long says so once."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt import notices
from graphopt.errors import BackendError
from graphopt.runtime.backends.deadline import within

ROOT = Path(__file__).parents[1]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) if x.sum() > 1e9 else -self.lin(x)


def test_a_warning_points_at_the_users_line() -> None:
    model = graphopt.optimize(Branches(), backend="eager", fallback="eager", cache="off")
    outer = nn.Sequential(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outer(torch.randn(2, 3))  # through torch's own modules
    (warning,) = caught
    assert warning.filename == __file__
    line = Path(__file__).read_text().splitlines()[warning.lineno - 1]
    assert "outer(torch.randn(2, 3))" in line


def test_every_warning_of_the_library_goes_this_way() -> None:
    files = [f for d in ("graphopt", "passes", "runtime") for f in (ROOT / d).rglob("*.py")]
    others = [
        f.relative_to(ROOT).as_posix()
        for f in files
        if "examples" not in f.parts and "testing" not in f.parts
        if "warnings.warn(" in f.read_text() and f.name != "notices.py"
    ]
    assert not others


def test_what_takes_long_says_what_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "PATIENCE", 0.01)
    with notices.telling("capturing Net", "the first call with x"):
        time.sleep(0.05)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "graphopt: capturing Net: the first call with x …"
    assert last.startswith("graphopt: capturing Net took 0.")


def test_it_says_so_where_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "PATIENCE", 0.01)
    with contextlib.suppress(ValueError), notices.telling("capturing Net", "a call"):
        time.sleep(0.05)
        raise ValueError
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with notices.telling("capturing Net", "a call"):
        pass
    assert capsys.readouterr().err == ""


def test_a_capture_and_its_trial_are_told_and_can_be_kept_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "PATIENCE", 0.0)
    make = lambda: graphopt.optimize(  # noqa: E731
        nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), backend="eager", cache="off"
    )
    make()
    said = capsys.readouterr().err
    assert "graphopt: capturing Sequential: the first call with input: float32[2, 3]" in said
    assert "graphopt: comparing Sequential with PyTorch eager: verify='eager'" in said
    monkeypatch.setenv("GRAPHOPT_LOG", "quiet")
    make()
    assert capsys.readouterr().err == ""


def test_a_choice_that_takes_too_long_ends() -> None:
    from torch._inductor.graph import GraphLowering

    before = GraphLowering.run_node

    def compile() -> None:
        try:
            GraphLowering.run_node(None, None)  # type: ignore[arg-type]
        except Exception as error:
            raise BackendError("Inductor failed") from error

    with pytest.raises(BackendError, match="longer than the 0 s that a choice may take"), within(0):
        compile()
    assert GraphLowering.run_node is before
    with pytest.raises(BackendError, match="no compiler"), within(60):
        raise BackendError("no compiler")
