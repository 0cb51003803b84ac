"""Errors of a capture, and `doctor M`, name the largest submodules that can be captured."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphopt
from graphopt.cli.main import app
from graphopt.errors import CaptureError
from graphopt.model.parts import largest_parts

MODELS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, branches=False):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.branches = branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x
        return x + self.down(self.up(x).relu())

class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.encoder = nn.Sequential(*blocks)
        self.head = Block(4, branches=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.encoder(x))

def whole():
    return Net(Block(32), Block(16)), (torch.randn(3, 8),)

def inside():
    return Net(Block(32), Block(16, branches=True)), (torch.randn(3, 8),)

def none():
    return Block(4, branches=True), (torch.randn(3, 8),)

def good():
    return Block(4), (torch.randn(3, 8),)
"""
_made: dict[str, object] = {}
exec(MODELS, _made)


def _model(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return _made[name]()  # type: ignore[operator, no-any-return]


def _parts(name: str, **options: float) -> list[tuple[str, int]]:
    model, args = _model(name)
    found = largest_parts(model, type(model).forward, args, {}, nullcontext, **options)
    return [(part.expression, round(100 * part.share)) for part in found]


def test_the_largest_submodule_comes_whole() -> None:
    # Products of the blocks: 2 * 3 * 8 * (2 * 32 + 2 * 16 + 2 * 4) operations.
    assert _parts("whole") == [("model.encoder", 92)]


def test_what_is_inside_of_a_refused_one_is_tried() -> None:
    assert _parts("inside") == [("model.encoder[0]", 62)]


def test_a_single_layer_is_no_part() -> None:
    assert _parts("none") == []


def test_no_part_is_tried_when_time_is_over() -> None:
    assert _parts("whole", seconds=0.0) == []


def test_the_error_names_line_and_part_and_leaves_no_trace() -> None:
    model, (x,) = _model("whole")
    graphopt.optimize(model, backend="eager", cache="off")
    before = torch.get_rng_state()
    with pytest.raises(CaptureError) as caught:
        model(x)
    said = str(caught.value)
    assert "graphopt.optimize(model.encoder) works and holds 92 % of the FLOPs" in said
    assert "  at: " in said
    assert torch.equal(torch.get_rng_state(), before)
    assert model.calls == 0
    assert not model.encoder._forward_hooks
    assert not model.encoder._forward_pre_hooks
    graphopt.optimize(model.encoder, backend="eager", cache="off")(x).sum().backward()
    assert model.encoder[0].up.weight.grad is not None


def test_with_example_inputs_it_does_too() -> None:
    model, args = _model("whole")
    with pytest.raises(CaptureError, match=r"optimize\(model\.encoder\) works"):
        graphopt.optimize(model, args, backend="eager", cache="off")


def test_the_search_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = _model("whole")
    graphopt.optimize(model, backend="eager", cache="off")
    with pytest.raises(CaptureError, match="works and holds"):
        model(x)
    monkeypatch.setattr("graphopt.model.parts._captured", lambda one: pytest.fail("searched"))
    with pytest.raises(CaptureError, match="Data-dependent branching"):
        model(x)


def test_nobody_searches_for_a_call_that_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.model.parts._captured", lambda one: time.sleep(60))
    model, (x,) = _model("whole")
    graphopt.optimize(model, backend="eager", cache="off", fallback="eager")
    with pytest.warns(UserWarning, match="run as plain PyTorch"):
        model(x)


# -- doctor ----------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> str:
    file = tmp_path / "models_to_ask.py"
    file.write_text(MODELS)
    return str(file)


def test_doctor_names_them(models: str) -> None:
    result = CliRunner().invoke(app, ["doctor", f"{models}:inside"])
    assert result.exit_code == 1
    said = result.stdout.splitlines()
    assert said[0].startswith("models_to_ask:inside: forward cannot be captured")
    assert "if self.branches and x.sum() > 1e9" in said[1]
    assert said[-1] == "  graphopt.optimize(model.encoder[0]) works and holds 62 % of the FLOPs"


def test_doctor_answers_as_json(models: str) -> None:
    result = CliRunner().invoke(app, ["doctor", f"{models}:whole", "--json"])
    found = json.loads(result.stdout)
    assert (found["schema"], found["state"]) == ("graphopt.doctor.model/1", "failed")
    (part,) = found["parts"]
    assert part["path"] == "encoder"
    assert part["optimize"] == "model.encoder"
    assert part["share"] == pytest.approx(48 / 52)


def test_doctor_of_a_model_that_can_be_captured(models: str) -> None:
    result = CliRunner().invoke(app, ["doctor", f"{models}:good"])
    assert result.exit_code == 0
    assert "captured as one graph of" in result.stdout


def test_doctor_of_a_model_without_parts(models: str) -> None:
    result = CliRunner().invoke(app, ["doctor", f"{models}:none"])
    assert result.exit_code == 1
    assert "no submodule of more than one layer" in result.stdout


def test_doctor_of_no_model() -> None:
    result = CliRunner().invoke(app, ["doctor", "nowhere.py:make"])
    assert result.exit_code == 2
    assert "there is no file 'nowhere.py'" in result.stderr
