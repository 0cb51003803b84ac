"""Pipelines over two ranks, one core each: graphopt's schedules, PyTorch's, and no flushes.

All variants train the same chain of equal blocks with the same stages and as many updates. They
take turns in random order, a block of steps each; ratios are medians of paired blocks with
bootstrap intervals. Predictions are those of the simulator from measured times of operators, plus
the optimizer's step. Targets: without flushes at least 90 % of what the bubble costs, ``(m + 1) /
m``; synchronous schedules at most 1.02 times PyTorch's; predictions within 10 %; a step that
stashes weights at most 1.1 times one that does not.

Run ``python -m benchmarks.pipeline`` on an idle machine (about 5 minutes); it writes
``benchmarks/results/pipeline.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import alternate, keep, milliseconds, ratio
from benchmarks.pipeline_worker import Config
from graphopt.optim import DelayedSGD
from graphopt.schedules.generate import generate
from graphopt.simulate.pipeline import StageCost, Transfer, simulate_pipeline

ROOT = Path(__file__).parents[1]
PEERS = {"gpipe": "torch gpipe", "1f1b": "torch 1f1b", "zero_bubble": "torch 1f1b"}


def measure(config: Config, limit: float) -> dict[str, Any]:
    """Run both ranks, and return what was found for each number of micro-batches."""
    path = Path(config.folder) / "config.json"
    path.write_text(json.dumps(asdict(config)))
    logs = [Path(config.folder) / f"rank{rank}.log" for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "benchmarks.pipeline_worker", str(path), str(rank)]
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=ROOT)
                )
        end = time.monotonic() + limit
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.returncode for p in processes):
                break
            time.sleep(0.2)
    finally:
        alive = [p for p in processes if p.poll() is None]
        for process in alive:
            process.kill()
            process.wait()
    if alive or any(p.returncode for p in processes):
        tails = "\n".join(log.read_text()[-2000:] for log in logs)
        raise RuntimeError(f"{config.model} did not finish:\n{tails}")
    ranks = [json.loads((Path(config.folder) / f"rank{r}.json").read_text()) for r in range(2)]
    return {m: summary(int(m), ranks[0][m], ranks[1][m]) for m in ranks[0]}


def summary(micro_batches: int, first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios, and predictions beside what was measured."""
    times: dict[str, list[float]] = first["times"]
    gain = (micro_batches + 1) / micro_batches
    found: dict[str, Any] = {
        "milliseconds": milliseconds(times),
        "over torch": {name: ratio(times, name, peer) for name, peer in PEERS.items()},
        "bubble-free gain": round(gain, 4),
        "loss after as many steps": first["loss"],
    }
    gains = {
        peer: {k: round(v, 4) for k, v in ratio(times, peer, "no_flush").items()}
        for peer in ("torch gpipe", "torch 1f1b", "1f1b")
    }
    found["speed-up without flushes"] = gains
    found["share of the gain"] = {
        peer: round((value["median"] - 1) / (gain - 1), 3) for peer, value in gains.items()
    }
    updates = [rank["update"] for rank in (first, other)]
    found["predicted"] = {
        name: _prediction(name, plan, micro_batches, updates, first["message"], times[name])
        for name, plan in first["plans"].items()
    }
    found["stages"] = first["plans"]["1f1b"]
    return found


def _prediction(
    name: str,
    plan: dict[str, Any],
    micro_batches: int,
    updates: list[float],
    message: float,
    times: list[float],
) -> dict[str, float]:
    """Milliseconds per step, predicted and measured."""
    costs = [
        StageCost(*seconds, update=u) for seconds, u in zip(plan["stages"], updates, strict=True)
    ]
    transfers = [Transfer(message, message)]
    measured = statistics.median(times)
    found = {"measured": round(1e3 * measured, 3)}
    # One core computes and sends: a message costs its time on both ranks, as one that is awaited.
    for what, overlap in (("", False), (" with free cores for messages", True)):
        if name == "no_flush":
            long, short = (
                simulate_pipeline(
                    generate(name, 2, steps * micro_batches, every=micro_batches),
                    costs,
                    transfers,
                    overlap=overlap,
                ).step
                for steps in (12, 6)
            )
            predicted = (long - short) / 6
        else:
            schedule = generate(name, 2, micro_batches)
            trace = simulate_pipeline(schedule, costs, transfers, overlap=overlap)
            predicted = trace.step + max(updates)
        found[f"predicted{what}"] = round(1e3 * predicted, 3)
        found[f"error{what}"] = round(predicted / measured - 1, 4)
    return found


def stashing(rounds: int) -> dict[str, Any]:
    """An update of 57 MB of weights: in place, into new memory, and with a copy kept."""
    torch.set_num_threads(2)
    models = [nn.Sequential(*(nn.Linear(1190, 1190) for _ in range(10))) for _ in range(3)]
    names = ("in place", "stash (new memory)", "copy")
    optimizers = [
        DelayedSGD(m.parameters(), 1e-3, momentum=0.9, rebind=n == names[1])
        for m, n in zip(models, names, strict=True)
    ]
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    kept: list[Any] = [None, None]

    def copying() -> None:
        kept.append(copy.deepcopy(models[2].state_dict()))
        kept.pop(0)
        optimizers[2].step()

    stashed: list[Any] = [None, None]

    def rebinding() -> None:
        stashed.append([p.detach() for p in models[1].parameters()])
        stashed.pop(0)
        optimizers[1].step()

    runs = dict(zip(names, (optimizers[0].step, rebinding, copying), strict=True))
    times = alternate(runs, rounds)
    return {
        "bytes": sum(4 * p.numel() for p in models[0].parameters()),
        "milliseconds": milliseconds(times),
        "over in place": {name: ratio(times, name, names[0]) for name in names[1:]},
    }


def main() -> None:
    """Measure all models, keep and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mlp,resnet,transformer")
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per model")
    options = parser.parse_args()
    found: dict[str, Any] = {"stashing": stashing(31)}
    print(json.dumps(found["stashing"]))
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            config = Config(model, folder, options.blocks, options.steps, (2, 4, 8))
            found[model] = measure(config, options.limit)
        for m, result in found[model].items():
            print(f"\n{model}, {m} micro-batches")
            for what in ("milliseconds", "over torch", "share of the gain", "predicted"):
                print(f"  {what}: {result[what]}")
    print(keep("pipeline", found))


if __name__ == "__main__":
    main()
