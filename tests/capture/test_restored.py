"""Flags that forward sets for a while and puts back, as libraries do around their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.capture import capture
from graphopt.capture.kept import Store
from tests.capture.test_kept import Process, route

TEXT = """
import torch
from torch import nn

class Flags:
    def __init__(self):
        self.causal = False
        self.mode = None
        self.count = 0

FLAGS = Flags()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.config = Flags()
    def inner(self, x):
        y = self.linear(x)
        return y.relu() if self.config.causal else y
    def forward(self, x):
        before = self.config.causal
        self.config.causal = True
        FLAGS.mode = "collecting"
        self.config.absent = 1
        try:
            y = self.inner(x)
        finally:
            self.config.causal = before
            del self.config.absent
            FLAGS.mode = None
        LAST
        return y
"""
X = torch.ones(2, 4)


def net(folder: Path, last: str = "pass") -> Any:
    return Process(folder).net(TEXT.replace("LAST", last))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_flags_that_are_put_back_are_no_change(folder: Path) -> None:
    model = net(folder)
    eager = model(X)
    assert capture(model, (X,), store=Store()).unkept == ""
    again = net(folder)
    found = capture(again, (X,), store=Store())
    assert found.route == "kept"
    again = graphopt.optimize(net(folder), backend="eager", cache="captures")
    assert torch.equal(again(X), eager)
    assert vars(again.config) == {"causal": False, "mode": None, "count": 0}


@pytest.mark.parametrize("name", ["causal", "absent"])
def test_another_flag_is_another_call(folder: Path, name: str) -> None:
    """In the process of the capture, too: forward would put back something else."""
    model = net(folder)
    found = capture(model, (X,), store=Store())
    assert found.holds(model, X)
    setattr(model.config, name, True)
    assert not found.holds(model, X)
    changed = net(folder)
    setattr(changed.config, name, True)
    assert route(changed, X) == "dynamo"


def test_a_flag_that_forward_overwrites_is_a_condition(folder: Path) -> None:
    """Nothing reads it, but a call leaves it as it was captured."""
    model = net(folder)
    first = capture(model, (X,), store=Store())
    flags = model.forward.__globals__["FLAGS"]
    flags.mode = "other"
    assert not first.holds(model, X)
    optimized = graphopt.optimize(model, backend="eager")
    optimized(X)
    assert flags.mode is None


@pytest.mark.parametrize(
    "last",
    [
        "self.config.mode = 'x'",  # another value
        "self.config.count = 0",  # a number may count something
        "self.config.mode = 1",  # another type
        "self.config.new = None",
        "del self.config.mode",
        "self.config.mode = y",
    ],
)
def test_what_is_another_one_at_the_end_is_a_change(folder: Path, last: str) -> None:
    made = capture(net(folder, last), (X,), store=Store())
    assert made.unkept == "forward changes Python objects"
    model = graphopt.optimize(net(folder, last), backend="eager", cache="captures")
    model(X)
    eager = net(folder, last)
    eager(X)
    kept, wanted = (
        {k: v for k, v in vars(m.config).items() if not isinstance(v, torch.Tensor)}
        for m in (model, eager)
    )
    assert kept == wanted
