"""Measured times: kept per graph and machine, checked when read, and the same on all ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from graphopt.cache import fingerprint
from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.model.surface import report
from graphopt.passbase import PassContext, Row
from graphopt.passes.precision import Precision, kept, times
from graphopt.passes.precision.formats import FORMATS
from graphopt.passes.precision.problem import find_problem
from tests.support.ranks import on_ranks


def _graph(width: int = 8) -> Graph:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(8, width), nn.ReLU()), (torch.randn(4, 8),)).graph


def _file() -> Path:
    (file,) = (Path(os.environ["XDG_CACHE_HOME"]) / "graphopt" / "precision").iterdir()
    return file


def _rows(graph: Graph, **options: Any) -> tuple[tuple[Row, ...], Row]:
    tables = Precision(**options).apply(graph.copy(), PassContext()).tables
    return tables["operators"], tables["totals"][0]


def test_a_second_run_takes_the_times_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _graph()
    first, totals = _rows(graph)
    assert totals["times"] == "measured"

    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(kept, "measured_times", never)
    second, totals = _rows(graph)
    assert totals["times"] == "kept"
    assert second == first


def test_other_graphs_formats_and_machines_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _rows(_graph())[1]["times"] == "measured"
    assert _rows(_graph(9))[1]["times"] == "measured"
    assert _rows(_graph(), format="fp16")[1]["times"] == "measured"
    assert _rows(_graph())[1]["times"] == "kept"
    monkeypatch.setattr(os, "cpu_count", lambda: 12345)
    assert _rows(_graph())[1]["times"] == "measured"
    assert fingerprint("a") != fingerprint("b")
    assert fingerprint("a", "b") == fingerprint("a", "b")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("cast"),
        lambda d: d.update(more=[]),
        lambda d: d["low"].pop(),
        lambda d: d["high"].__setitem__(0, -1.0),
        lambda d: d["high"].__setitem__(0, 1e9),
        lambda d: d["high"].__setitem__(0, "1"),
        lambda d: d["high"].__setitem__(0, float("nan")),
        lambda d: d.update(cast={}),
    ],
    ids=["missing", "more", "short", "negative", "long", "text", "nan", "no-list"],
)
def test_entries_that_make_no_sense_count_as_absent(change: Any) -> None:
    graph = _graph()
    _rows(graph)
    data = json.loads(_file().read_text())
    change(data["entry"])
    _file().write_text(json.dumps(data))
    assert _rows(graph)[1]["times"] == "measured"
    assert _rows(graph)[1]["times"] == "kept"


def test_nothing_is_kept_of_a_roofline() -> None:
    assert _rows(_graph(), cost="roofline")[1]["times"] == "roofline"
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "graphopt" / "precision").exists()


def test_times_go_to_data_and_back() -> None:
    graph = _graph()
    problem = find_problem(graph, FORMATS["bf16"], frozenset())
    made = times.assumed_times(graph, problem, FORMATS["bf16"])
    data = json.loads(json.dumps(kept.data_of(problem, made)))
    assert kept.times_of(problem, data) == made


def _reports_the_times_that_decided(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    graphopt.optimize(model, passes="cleanup,precision,group_gradients", backend="eager")
    model(torch.randn(8, 16)).square().mean().backward()
    outcome = report(model).specialisations[0].steps[1].outcome
    mine = json.dumps([outcome.tables, [(d.site, d.numbers) for d in outcome.declined]])
    both: list[Any] = [None, None]
    dist.all_gather_object(both, mine)
    assert both[0] == both[1]
    assert outcome.tables["totals"][0]["times"] == "measured"


@pytest.mark.distributed
def test_all_ranks_report_the_times_of_rank_0(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _reports_the_times_that_decided)
