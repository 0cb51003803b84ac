"""A measured link is kept for the next job of the same shape; rank 0 decides for all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from graphopt.network.curve import Curve
from graphopt.runtime.ranks import workers
from graphopt.runtime.ranks.link_cache import find, keep
from tests.support.ranks import on_ranks

CURVE = Curve(((1024.0, 1e-4), (1048576.0, 1e-3)), "measured on 2 ranks")
RANKS = ["host-a\ncpu", "host-b\ncpu"]


def _file() -> Path:
    (file,) = Path(os.environ["XDG_CACHE_HOME"], "graphopt", "links").iterdir()
    return file


def test_kept_and_found() -> None:
    assert find(RANKS) is None
    keep(RANKS, CURVE)
    found = find(RANKS)
    assert found is not None
    assert found.points == CURVE.points
    assert found.source == "measured on 2 ranks (kept from an earlier run)"
    for other in (RANKS[:1], RANKS[::-1], [*RANKS, RANKS[1]], [RANKS[0], "host-b\ncuda"]):
        assert find(other) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps({"points": [], "source": ""}),
        json.dumps({"points": [[1, 2e-3], [2, 1e-3]], "source": ""}),
        json.dumps({"points": [[1, float("nan")]], "source": ""}),
        json.dumps({"points": [[1, 0.0]], "source": ""}),
        json.dumps({"points": [[float("inf"), 1.0]], "source": ""}),
        json.dumps({"points": [[1, "soon"]], "source": ""}),
    ],
)
def test_a_file_that_holds_no_curve_is_ignored(text: str) -> None:
    keep(RANKS, CURVE)
    _file().write_text(text)
    assert find(RANKS) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    keep(RANKS, CURVE)
    assert find(RANKS) is None


def _asks(rank: int, folder: str) -> None:
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{rank}"  # as on hosts with homes of their own
    measured = 0
    measure = workers.measure

    def counting(*args: Any) -> Curve:
        nonlocal measured
        measured += 1
        return measure(*args)

    workers.measure = counting

    def link() -> Curve:
        found = workers.Workers.of(nn.Linear(2, 2))
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


def test_rank_0_decides_whether_there_is_one(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _asks, str(tmp_path / "homes"), timeout=30)
