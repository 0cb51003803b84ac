"""What the overlap benchmark makes of its ranks' times, and the link between them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import overlap
from benchmarks.link import Link
from benchmarks.overlap_variants import DEFAULT, GRAPHOPT, GROUPED, PLAIN
from benchmarks.overlap_worker import Config

SECONDS = {
    PLAIN: 0.1,
    DEFAULT: 0.4,
    "ddp cap 1 MiB": 0.25,
    "ddp cap 8 MiB": 0.3,
    "ddp compiled": 0.2,
    GROUPED: 0.24,
    GRAPHOPT: 0.3,
}


def told(gradients: str = "same") -> dict[str, Any]:
    return {
        "times": {name: [[s, s, 9.0]] * 7 for name, s in SECONDS.items()},
        "steps": 3,
        "own core": True,
        "gradients": {n: {"hash": gradients, "error": 0.0} for n in SECONDS if n != PLAIN},
        "buckets": {name: [1, 2] for name in SECONDS},
        "predicted": {name: 0.05 if name == GRAPHOPT else None for name in SECONDS},
        "order": {name: {"reason": "applied"} if name == GRAPHOPT else None for name in SECONDS},
        "failed": {"ddp compiled, other": "error"},
    }


def test_ratios_to_the_best_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    found = overlap.summary([told(), told()])
    assert found["blocks"] == 7
    assert found["caps measured"] == [1, 8]
    assert found["best cap by median"] == "ddp cap 1 MiB"
    assert found["best peer by median"] == "ddp compiled"
    assert found["exposed ms"][DEFAULT] == 300.0
    assert found["equal gradients on all ranks"]
    assert found["order of backward"] == {GRAPHOPT: {"reason": "applied"}}
    over = {best: r["median"] for best, r in found[f"{GRAPHOPT}, over"].items()}
    assert over == {
        overlap.BEST: 1.2,
        overlap.BEST_UNCOMPILED: 1.2,
        overlap.BEST_PEER: 1.5,
    }
    assert found["over ddp default"][overlap.BEST_PEER]["median"] == 0.5
    overlap.show("mlp", {"link": "a link", **found})
    words = capsys.readouterr().out
    assert "failed: ddp compiled, other: error" in words
    assert f"{GRAPHOPT} over {overlap.BEST_PEER}: 1.500" in words


def test_ranks_with_other_gradients_are_told() -> None:
    assert not overlap.summary([told(), told("other")])["equal gradients on all ranks"]


def test_cells_that_are_there_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "RESULTS", tmp_path)
    (tmp_path / "some.json").write_text(json.dumps({"results": {"mlp, 1 Gbit/s": {}}}))
    asked: list[tuple[str, list[float]]] = []

    def measure(model: str, rates: list[float], options: argparse.Namespace) -> overlap.Cells:
        asked.append((model, rates))
        yield from ()

    monkeypatch.setattr(overlap, "measure", measure)
    words = ["overlap", "--models", "mlp,densenet", "--rates", "1,0", "--keep", "some"]
    monkeypatch.setattr("sys.argv", words)
    overlap.main()
    assert asked == [("mlp", [0.0]), ("densenet", [1.0, 0.0])]


def test_ranks_wait_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap.subprocess, "Popen", lambda *_, **__: None)
    config = Config("mlp", str(tmp_path), [1.0, 2.0], 1.0, 7, 1, [])
    link = Link("loopback", 0.0, ([], []), ("lo", "lo"))
    monkeypatch.setattr(Link, "limited", lambda self, rate: Link("lo", rate, *list_of(self)))
    signal = tmp_path / "go"
    pair = overlap._Pair(config, link, str(signal))
    pair._answer()  # nobody asks
    (tmp_path / "wanted1").write_text("2.0")
    pair._answer()
    assert (tmp_path / "go.ready").read_text() == "mlp 2\n"
    assert not (tmp_path / "done1").exists()
    signal.touch()
    pair._answer()
    assert (tmp_path / "done1").exists()
    assert pair.way.rate == 2.0
    assert not signal.exists()
    assert not (tmp_path / "go.ready").exists()


def list_of(link: Link) -> tuple[Any, Any]:
    return link.prefixes, link.interfaces


def test_loopback_takes_no_limit() -> None:
    link = Link("loopback", 0.0, ([], []), ("lo", "lo"))
    assert link.limited(0.0).rate == 0.0
    with pytest.raises(RuntimeError, match="a rate needs root"):
        link.limited(1.0)
