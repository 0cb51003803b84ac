"""Every operator that a text may call, once with random arguments, in a process of its own."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from benchmarks import sweep_operators as sweeping
from graphopt.errors import TextError


def test_every_operator_is_read_or_refused_and_runs_nothing() -> None:
    found = sweeping.in_processes(0, len(sweeping.names()), seed=1_000_000)
    assert found.keys() <= {sweeping.READ, sweeping.REFUSED}, found
    assert sum(found.values()) == len(sweeping.names())
    assert found[sweeping.READ] > 50


def test_what_runs_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def runs(text: str) -> None:
        parsed.append(text)
        torch.ones(2) + 1

    monkeypatch.setattr(sweeping.graphopt, "parse_graph", runs)
    assert sweeping.attempt("aten::relu", random.Random(0)) == sweeping.RAN
    assert "aten.relu.default" in parsed[0]

    def draws(text: str) -> None:
        torch._C.default_generator.manual_seed(random.randrange(2**31))

    monkeypatch.setattr(sweeping.graphopt, "parse_graph", draws)
    with warnings.catch_warnings(), torch.random.fork_rng():
        assert sweeping.attempt("aten::relu", random.Random(0)) == sweeping.RAN

    def raises(text: str) -> None:
        raise TypeError("raw")

    monkeypatch.setattr(sweeping.graphopt, "parse_graph", raises)
    assert sweeping.attempt("aten::relu", random.Random(0)) == sweeping.RAW

    def refuses(text: str) -> None:
        raise TextError("no", where="line 1", hint="another one")

    monkeypatch.setattr(sweeping.graphopt, "parse_graph", refuses)
    assert sweeping.attempt("aten::relu", random.Random(0)) == sweeping.REFUSED
