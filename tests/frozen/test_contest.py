"""Of several executables the fastest one runs, and is found again."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import fx

from graphopt.runtime.frozen import contest
from graphopt.runtime.frozen.contest import Contest

aten = torch.ops.aten


def _graph(target: Any = aten.relu.default) -> fx.Graph:
    graph = fx.Graph()
    graph.output([graph.call_function(target, (graph.placeholder("x"),))])
    return graph


class Makers(dict[str, Any]):
    """Executables that take so many seconds; ``None`` cannot be made."""

    def __init__(self, **seconds: float | None) -> None:
        self.made: list[str] = []
        super().__init__({n: lambda n=n, s=s: self._make(n, s) for n, s in seconds.items()})

    def _make(self, name: str, seconds: float | None) -> Any:
        self.made.append(name)
        if seconds is None:
            return None

        def run(arguments: list[Any]) -> list[Any]:
            time.sleep(seconds)
            arguments.clear()
            return [name]

        return run


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _run(makers: Makers, graph: fx.Graph | None = None) -> tuple[Any, list[str]]:
    made = Contest(makers, graph or _graph(), "test", unmeasured="packed")
    return made([torch.ones(2)])[0], makers.made


def test_fastest_one_runs_and_is_the_only_one_made_next_time() -> None:
    seconds = {"plain": 0.03, "tuned": 0.0005, "packed": 0.03, "none": None}
    assert _run(Makers(**seconds)) == ("tuned", ["plain", "tuned", "packed", "none"])
    assert _run(Makers(**seconds)) == ("tuned", ["tuned"])


def test_what_was_kept_and_cannot_be_made_any_more_is_left() -> None:
    assert _run(Makers(plain=0.03, packed=0.0005))[0] == "packed"
    assert _run(Makers(plain=0.03, packed=None)) == ("plain", ["packed", "plain"])


@pytest.mark.parametrize(
    ("seconds", "expected"), [({"packed": 0.0}, "packed"), ({"packed": None}, "plain")]
)
def test_graph_that_draws_numbers_is_not_measured(seconds: Any, expected: str) -> None:
    makers = Makers(plain=0.0, tuned=0.0, **seconds)
    name, made = _run(makers, _graph(aten.bernoulli.default))
    assert name == expected
    assert "tuned" not in made


def test_no_more_are_made_when_making_took_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "MAKING", -1.0)
    assert _run(Makers(plain=0.03, tuned=0.0)) == ("plain", ["plain"])


def test_what_is_no_result_is_measured_again(tmp_path: Any) -> None:
    assert _run(Makers(plain=0.03, packed=0.0005))[0] == "packed"
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"format": 1, "entry": {"chosen": "other", "seconds": {}}}')
    assert _run(Makers(plain=0.03, packed=0.0005)) == ("packed", ["plain", "packed"])


@pytest.mark.parametrize(("dropout", "is_measured"), [((), True), ((0.0,), True), ((0.1,), False)])
def test_attention_that_drops_nothing_is_measured(dropout: Any, is_measured: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    graph.output([graph.call_function(attention, (x, x, x, *dropout))])
    makers = Makers(plain=0.03, packed=0.0, tuned=0.03)
    assert (_run(makers, graph)[1] == ["plain", "packed", "tuned"]) == is_measured
