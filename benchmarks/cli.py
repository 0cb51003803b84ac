"""Seconds of each command of two checkouts, before and after, on a ResNet-18 and a GPT-2.

Run ``python -m benchmarks.cli OLD [NEW] [--rounds N] [--wall]``, where OLD and NEW are checkouts
(NEW is this one by default). Each command is a process of its own from start to end, with the
imports of torch and of the model's packages; the two checkouts take turns. Counted are processor
seconds of one thread, user and system, which other work on the machine changes little; with
``--wall``, on an otherwise idle machine, also seconds on the clock. Results go to
``benchmarks/results/cli.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import keep

HERE = Path(__file__).parents[1]
FACTORIES = Path(__file__).with_name("cli_models.py")
PARAMETER = {"resnet18": "stem.0.weight", "gpt2": "transformer.h.0.attn.c_attn.weight"}
ALONE = {"passes": ["passes"], "doctor": ["doctor"]}
"""Commands without a model."""


def commands(model: str, device: list[str], folder: Path) -> dict[str, list[str]]:
    """All commands on one model, by what the results call them."""
    name = f"{FACTORIES}:{model}"
    text = str(folder / f"{model}.gopt")
    return {
        "show": ["show", name],
        "show a text": ["show", text],
        "run": ["run", name, "-p", "cleanup"],
        "why": ["why", name, PARAMETER[model]],
        "diff": ["diff", name, "", "cleanup"],
        "verify": ["verify", name, "-p", "cleanup"],
        "plan": ["plan", name, "--mesh", "dp=64", *device],
        "simulate": ["simulate", name, "--mesh", "dp=64", "--cluster", "summit", *device],
        "calibrate": ["calibrate", name, "-o", str(folder / "calibration.json")],
        "report": ["report", name, "-o", str(folder / "report.html")],
        "doctor M": ["doctor", name],
    }


@dataclass(frozen=True)
class Cost:
    """Of one process: its exit code, its processor seconds and its seconds on the clock."""

    code: int
    processor: float
    wall: float


def cost(checkout: Path, arguments: list[str]) -> Cost:
    """Run one command of one checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "graphopt", *arguments],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(process.returncode, used.ru_utime + used.ru_stime, wall)


def _row(costs: dict[str, list[Cost]], *, wall: bool) -> dict[str, object]:
    """Medians of both checkouts and of the ratio of pairs; ``None`` where one has no such thing."""
    row: dict[str, object] = {}
    for key in ("processor", "wall") if wall else ("processor",):
        values = {
            side: [getattr(one, key) for one in all_ if one.code in (0, 1)]
            for side, all_ in costs.items()
        }
        pairs = [a / b for a, b in zip(values["after"], values["before"], strict=False)]
        row[key] = {
            **{s: round(statistics.median(v), 3) if v else None for s, v in values.items()},
            "ratio": round(statistics.median(pairs), 3) if pairs else None,
            "ratios": [round(pair, 3) for pair in pairs],
        }
    return row


def _device(checkout: Path) -> list[str]:
    """How a checkout is told what to plan for; earlier ones assume something."""
    command = [sys.executable, "-m", "graphopt", "plan", "--help"]
    said = subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    return ["--device", "h100"] if "--device" in said.stdout else []


def main() -> None:
    """Measure, print a table, keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=HERE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wall", action="store_true")
    options = parser.parse_args()
    checkouts = {"before": options.old.resolve(), "after": options.new.resolve()}
    devices = {side: _device(checkout) for side, checkout in checkouts.items()}
    table: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for model in (None, *PARAMETER):
            if model is not None:
                _write_text(checkouts["after"], model, folder)
            sides = {
                side: ALONE if model is None else commands(model, devices[side], folder)
                for side in checkouts
            }
            rows: dict[str, object] = {}
            for name in sides["after"]:
                costs: dict[str, list[Cost]] = {side: [] for side in checkouts}
                for number in range(options.rounds):
                    order = list(checkouts) if number % 2 else list(checkouts)[::-1]
                    for side in order:
                        costs[side].append(cost(checkouts[side], sides[side][name]))
                if any(one.code not in (0, 1) for one in costs["after"]):
                    raise RuntimeError(f"{' '.join(sides['after'][name])} fails")
                rows[name] = _row(costs, wall=options.wall)
                print(model or "-", name, rows[name], flush=True)
            table[model or "without a model"] = rows
    kept = {
        "measures": "processor seconds of a whole command as a process of its own, one thread"
        + ("; wall: seconds on the clock, on an idle machine" if options.wall else ""),
        "rounds": options.rounds,
        "before": _commit(checkouts["before"]),
        "commands": table,
    }
    print(keep("cli", kept))


def _write_text(checkout: Path, model: str, folder: Path) -> None:
    """The graph of a model as text, which both checkouts then read."""
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "show", f"{FACTORIES}:{model}", "--text"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / f"{model}.gopt").write_text(done.stdout)


def _commit(checkout: Path) -> str:
    command = ["git", "describe", "--always"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
