"""Captures that go on and on: said once, with what changes; then no more, and what is dropped."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError
from graphopt.model import sites
from graphopt.model.controller import controller_of
from graphopt.model.sites import changes_of


class Modal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.kind = "a"

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = self.lin(x)
        return x if self.kind < "m" else -x


def _optimized(**options: Any) -> nn.Module:
    settings = {"backend": "eager", "passes": "", "verify": "off"} | options
    return graphopt.optimize(Modal(), **settings)


def _said(caught: list[warnings.WarningMessage]) -> list[str]:
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_the_fourth_capture_names_the_size_that_changes() -> None:
    model = _optimized(dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (3, 4, 5):
            model(torch.randn(n, 4))
        assert not caught
        for n in (6, 7):
            model(torch.randn(n, 4))
    (said,) = _said(caught)
    assert "captured 4 times in training: x.0 was 3, then 4, 5 and 6" in said
    assert "dynamic=False" in said
    assert "because    x.0 was 6 and is 7" in model.explain()


def test_warnings_that_are_errors_end_the_call_and_nothing_else() -> None:
    model = _optimized(dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (3, 4, 5):
            model(torch.randn(n, 4))
        with pytest.raises(UserWarning, match="captured 4 times in training"):
            model(torch.randn(6, 4))
        assert len(graphopt.model.surface.report(model).specialisations) == 4
        model(torch.randn(6, 4)).sum().backward()
    assert not graphopt.model.surface.report(model).plain


def test_a_number_and_its_line_are_named_and_each_form_counts_for_itself() -> None:
    model = _optimized()
    x = torch.randn(2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for times in (1, 2, 3):
            model(x, times)
            with torch.no_grad():
                model.eval()(x, times)
            model.train()
        assert not caught
        model.kind = "b"
        model(x, 3)
    (said,) = _said(caught)
    assert "in training: times was 1, then 2 and 3 (read at: for _ in range(times):" in said
    assert "self.kind was 'a', then 'b'" in said


def test_captures_end_and_calls_run_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "MAX_CAPTURES", 5)
    model = _optimized(dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(2, 12):
            model.zero_grad()
            model(torch.randn(n, 4)).sum().backward()
            assert model.lin.weight.grad is not None
    _, ended = _said(caught)
    assert "captured 5 times" in ended
    assert "run plain" in ended
    assert "graphopt.data.bucket" in ended
    assert controller_of(model).made == 5
    assert "run plain" in model.explain()
    with torch.no_grad():  # another form
        model.eval()(torch.randn(3, 4))
    assert controller_of(model).made == 6


def test_captures_end_with_an_error_where_the_user_wants_no_plain_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sites, "MAX_CAPTURES", 2)
    model = _optimized(dynamic=False, fallback="error")
    for n in (2, 3):
        model(torch.randn(n, 4))
    with pytest.raises(CaptureError, match=r"captured 2 times in training: x\.0 was 2, then 3"):
        model(torch.randn(4, 4))
    model(torch.randn(3, 4))


def test_what_is_dropped_is_freed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.model.controller.MAX_SPECIALISATIONS", 2)
    model = _optimized(dynamic=False)
    with torch.no_grad():
        model.eval()(torch.randn(2, 4))
    model.train()
    engines = []
    for n in (2, 3, 2, 4):
        model(torch.randn(n, 4)).sum().backward()
        engines.append(weakref.ref(controller_of(model).variants[0].engine))
    gc.collect()
    assert [engine() is not None for engine in engines] == [True, False, True, True]
    assert "dropped in training: x: float32[3, 4] (train)" in model.explain()
    assert "x: float32[2, 4] (eval, no_grad)" in model.explain()


@pytest.mark.parametrize(
    ("failure", "sizes", "said"),
    [
        ("tensor 'L['x']' size mismatch at index 0. expected 4, actual 5", True, "x.0 was 4 and"),
        ("2 <= L['x'].size()[0] <= 4  # h = f(x)", True, "x.0 was 4 and is 5"),
        ("a pass or a backend holds for s3 <= 4 only", True, "x.0 was 4 and is 5"),
        ("", True, "x.0 was 4 and is 5"),
        ("tensor 'L['x']' dtype mismatch. expected Float, actual Double", False, "dtype of x was"),
        (
            "tensor 'L['x']' requires_grad mismatch. expected requires_grad=0",
            False,
            "requires_grad of x was False and is True",
        ),
        ("L['step'] == 1   # a.py:3", True, "step was 1 and is 7"),
        ("L['mask'] is None  # a.py:3", False, "mask was None and is a Tensor"),
        ("___check_type_id(L['step'], 14068391), type=<class 'float'>", False, "type of step was"),
        ("GLOBAL_STATE changed: grad_mode", False, "'GLOBAL_STATE changed: grad_mode' no longer"),
    ],
)
def test_what_changed(failure: str, sizes: bool, said: str) -> None:
    variables = {"x": torch.ones(5, 4), "step": 7, "mask": torch.ones(5)}
    (change,) = changes_of(failure, {"x.0": (4, 5)} if sizes else {}, variables)
    assert str(change).startswith(said)
