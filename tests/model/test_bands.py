"""The backend of a symbolic graph is the one that was faster for sizes like those of a call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model import backend_choice, bands
from graphopt.model.bands import Bands, PerBand, band_of
from graphopt.model.controller import controller_of
from graphopt.runtime.backends.eager import Eager
from graphopt.runtime.backends.inductor import Inductor

LARGE = 32  # from this batch on, generated code is faster


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches that were timed. Nothing is compiled, and times are made up."""
    found: list[int] = []

    def build(_: Inductor, *args: Any) -> Any:
        return Eager().build(*args)

    def times(trial: Any, calls: Mapping[str, Any]) -> dict[str, float]:
        found.append(len(trial.args[0]))
        return {"eager": 1.0, "inductor": 0.5 if found[-1] >= LARGE else 2.0}

    monkeypatch.setattr(Inductor, "build", build)
    monkeypatch.setattr(backend_choice, "times", times)
    return found


def _model() -> nn.Module:
    dynamic = {"input": {0: "batch"}}
    return graphopt.optimize(nn.Linear(4, 4), passes="", dynamic=dynamic)


def _x(batch: int) -> Tensor:
    return torch.randn(batch, 4)


def test_a_band_is_measured_once_and_the_report_says_what_runs(timed: list[int]) -> None:
    model = _model()
    for batch in (8, 9, 16, 100, 90, 8, 127):
        model(_x(batch)).sum().backward()
    assert timed == [8, 100]
    assert controller_of(model).made == 1
    assert "backend    eager (asked: auto)" in model.explain()
    assert "eager at 8 to 31 (2.00x), inductor at 32 to 127 (0.50x)" in model.explain()


def test_a_later_run_measures_nothing_again(timed: list[int]) -> None:
    for batch in (8, 100):
        _model()(_x(batch))
    assert timed == [8, 100]
    again = _model()
    for batch in (20, 70):
        again(_x(batch))
    assert timed == [8, 100]
    assert "some in an earlier run" in again.explain()


def test_a_call_that_cannot_be_timed_runs(
    timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    model(_x(8))
    monkeypatch.setattr(backend_choice, "times", None)
    assert model(_x(200)).shape == (200, 4)


def test_few_bands_are_measured_and_others_follow_the_nearest() -> None:
    found = Bands("key")
    calls = {name: lambda model, size, name=name: name for name in ("eager", "inductor")}
    measured = []

    def measure(model: Any, args: Any, kwargs: Any, calls: Any) -> dict[str, float]:
        measured.append(args[0])
        return {"eager": 1.0, "inductor": 0.5 if args[0] >= LARGE else 2.0}

    found.add(band_of((8,)), {"eager": 1.0, "inductor": 2.0})
    call = PerBand(found, calls, lambda model, size: (size,), measure, band_of((8,)))
    sizes = [2**n for n in range(1, 40)]
    assert [call(None, n) for n in sizes] == ["eager" if n < LARGE else "inductor" for n in sizes]
    assert len(measured) == bands.MAX_BANDS - 1
    assert Bands("key").seconds == found.seconds


@pytest.mark.parametrize("entry", [[], {"a": {}}, {"3": {"eager": 1.0}}, {"3": {"eager": -1.0}}])
def test_an_entry_that_nobody_wrote_is_absent(entry: object) -> None:
    bands.CACHE.write("key", entry)
    assert Bands("key").seconds == {}


def test_what_runs_other_sizes_is_compared_when_it_first_does(
    timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that is right at the captured size and wrong at large ones is given up, loudly."""

    def build(_: Inductor, *args: Any) -> Any:
        engine = Eager().build(*args)
        return lambda inputs: [1.5 * t if len(t) >= LARGE else t for t in engine(inputs)]

    monkeypatch.setattr(Inductor, "build", build)
    model = _model()
    model(_x(8))
    x = _x(100)
    with pytest.warns(UserWarning, match="backend 'eager' runs calls of these sizes") as told:
        found = model(x)
    assert [one.filename for one in told] == [__file__]
    assert torch.equal(found, nn.functional.linear(x, model.weight, model.bias))
