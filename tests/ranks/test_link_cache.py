"""A measured link is cached for the next job of the same shape; rank 0 decides for all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from graphopt.network.curve import Curve
from graphopt.runtime.ranks import ranks
from graphopt.runtime.ranks.link_cache import find, keep
from tests.support.ranks import on_ranks

CURVE = Curve(((1024.0, 1e-4), (1048576.0, 1e-3)), "measured on 2 ranks")
RANKS = ["host-a\ncpu", "host-b\ncpu"]


def _file() -> Path:
    (file,) = Path(os.environ["XDG_CACHE_HOME"], "graphopt", "links").iterdir()
    return file


def test_found_again() -> None:
    assert find(RANKS) is None
    keep(RANKS, CURVE)
    found = find(RANKS)
    assert found is not None
    assert found.points == CURVE.points
    assert found.source == "measured on 2 ranks (kept from an earlier run)"
    for other in (RANKS[:1], RANKS[::-1], [*RANKS, RANKS[1]], [RANKS[0], "host-b\ncuda"]):
        assert find(other) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"points": []},
        {"points": None},
        {"points": {"1": 1.0}},
        {"points": [1.0, 2.0]},
        {"points": [[1, 2e-3], [2, 1e-3]]},
        {"points": [[2, 1e-3], [1, 2e-3]]},
        {"points": [[1, 1e-3, 1e-3]]},
        {"points": [[1, float("nan")]]},
        {"points": [[1, 0.0]]},
        {"points": [[1, 1e308]]},
        {"points": [[1, "soon"]]},
        {"points": [[1, True]]},
        {"points": [[float("inf"), 1.0]]},
        {"points": [[10**400, 1.0]]},
        {"points": [[-5, 1.0]]},
        {"points": [[0, 1e-320], [1e-320, 1.0]]},
        {"source": None},
        {"joining": -1.0},
        {"joining": 1e308},
        {"joining": float("nan")},
        {"joining": "0"},
    ],
)
def test_an_entry_that_is_no_curve_is_ignored(wrong: dict[str, Any]) -> None:
    keep(RANKS, CURVE)
    entry = json.loads(_file().read_text())
    _file().write_text(json.dumps({**entry, "entry": {**entry["entry"], **wrong}}))
    assert find(RANKS) is None
    _file().write_text(json.dumps(entry))
    assert find(RANKS) is not None


def _asks(rank: int, folder: str) -> None:
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{rank}"  # as on hosts with homes of their own
    measured = 0
    measure = ranks.measure_link

    def counting(*args: Any) -> Curve:
        nonlocal measured
        measured += 1
        return measure(*args)

    ranks.measure_link = counting

    def link() -> Curve:
        found = ranks.Ranks.of(nn.Linear(2, 2), dist.group.WORLD)
        assert found is not None
        curve = found.link()
        assert found.link() == curve
        assert found.copy().link() == curve
        return curve

    first = link()
    assert (measured, first.source) == (1, "measured on 2 ranks")
    again = link()
    assert (measured, again.points) == (1, first.points)
    assert "kept from an earlier run" in again.source
    assert Path(folder, "0").exists()
    assert not Path(folder, "1").exists()

    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if rank else "other"
    link()
    assert measured == 2
    link()
    assert measured == 2
    if rank == 0:
        for file in Path(folder, "0", "graphopt", "links").iterdir():
            file.write_text("not a curve")
    link()
    assert measured == 3


@pytest.mark.distributed
def test_rank_0_decides_whether_there_is_one(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _asks, str(tmp_path / "homes"), timeout=30)
