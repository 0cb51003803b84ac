"""Trainings in number formats, side by side: an AlexNet, a ResNet and a Wasserstein GAN.

The networks, data and trainings are those of `examples/flexpoint`. The hyperparameters were chosen
in float32, and the formats are compared once with them: five seeds, each training of a seed on the
same weights, batches and dropout. The loss is the mean over the last quarter of the steps (of the
GAN: the critic's estimate of the Wasserstein distance). The target for ``flex16+5``, stated before:
its mean loss over the seeds is within 1 % of float32's for each of the three.

Rounding alone moves a training: a row of float32 whose first weights differ in their last bits
shows how far. Run ``python -m benchmarks.flexpoint_training`` (half an hour on two cores; needs
Pillow). It writes ``benchmarks/results/flexpoint_training.json`` and the picture; ``--picture``
draws it from that file again, ``--quick`` only shows that all of it runs, and ``--runs FOLDER``
keeps every training there and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.flexpoint_training_picture import Panel, picture
from benchmarks.harness import RESULTS, keep
from examples.flexpoint.train import ALL, TASKS, line

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "flexpoint_training.svg"
NAME = "flexpoint_training"
SEEDS = (0, 1, 2, 3, 4)
BASE = "fp32"
TARGET = 0.01
PROCESSES = 2
POINTS = 40  # of a curve
AXES = {
    "alexnet": "AlexNet, digits: training loss",
    "resnet": "ResNet, digits on photographs: training loss",
    "gan": "Wasserstein GAN, digits: estimated distance",
}
DRAWN = ("fp32", "bf16", "fp16-scaled", "fp16", "flex16+5", "flex16+8", "fixed-8.8")


# -- training --------------------------------------------------------------------------------------


def train(model: str, format: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """One training, as data.

    Returns:
        ``loss``, ``losses`` of every step, ``test``, ``flex`` and ``seconds``, see
        `examples.flexpoint.classify.Run`.
    """
    torch.set_num_threads(1)
    run = TASKS[model].train(format, seed, steps)
    print(f"{model} {seed} {line(format, run)}", file=sys.stderr, flush=True)
    return {
        "loss": run.loss,
        "losses": run.losses,
        "test": run.test,
        "flex": dict(run.flex),
        "seconds": run.seconds,
    }


Runs = Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]


def kept_or_trained(folder: Path, model: str, format: str, seed: int) -> dict[str, Any]:
    """A whole training, or what is in the folder of it."""
    path = folder / f"{model}.{format}.{seed}.json"
    if not path.exists():
        path.write_text(json.dumps(train(model, format, seed)))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def train_all(seeds: Sequence[int], steps: int | None = None, folder: Path | None = None) -> Runs:
    """All trainings by model, format and seed, a few at a time."""
    wanted = [(m, f, s) for s in seeds for m in TASKS for f in ALL]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        coming = {
            key: pool.submit(train, *key, steps)
            if folder is None
            else pool.submit(kept_or_trained, folder, *key)
            for key in wanted
        }
        return {m: {f: {s: coming[m, f, s].result() for s in seeds} for f in ALL} for m in TASKS}


# -- results ---------------------------------------------------------------------------------------


def summary(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """What is kept of the trainings of one model, by format; JSON data.

    ``change`` is the mean loss over the mean loss in float32, minus 1, and ``changes`` the same
    for each seed; a loss that is not finite makes them ``null``, and misses the target.
    """
    base = {seed: run["loss"] for seed, run in runs[BASE].items()}
    found = {}
    for format, of in runs.items():
        losses = {seed: run["loss"] for seed, run in of.items()}
        change = statistics.fmean(losses.values()) / statistics.fmean(base.values()) - 1
        found[format] = {
            "loss": _kept(statistics.fmean(losses.values())),
            "losses": {str(seed): _kept(loss) for seed, loss in losses.items()},
            "change": _kept(change),
            "changes": {str(seed): _kept(losses[seed] / base[seed] - 1) for seed in losses},
            "within the target": bool(abs(change) <= TARGET),
            "test": _means([run["test"] for run in of.values()]),
            "flex": _means([run["flex"] for run in of.values()]),
            "seconds": round(statistics.median(run["seconds"] for run in of.values()), 1),
            "curve": _curve([run["losses"] for run in of.values()]),
        }
    return found


def _kept(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    return {name: _kept(statistics.fmean(f[name] for f in found)) for name in found[0]}


def _curve(losses: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Last step of each stretch, and the mean loss of all seeds within it."""
    count = len(losses[0])
    size = max(1, count // POINTS)
    return [
        [end, _kept(statistics.fmean(x for of in losses for x in of[end - size : end]))]
        for end in range(size, count + 1, size)
    ]


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    lines = []
    for model, found in results["models"].items():
        tests = list(found[BASE]["test"])
        names = " | ".join(f"test {name}" for name in tests)
        lines += [
            f"{AXES[model]}\n",
            f"| format | loss | over fp32, mean (of single seeds) | {names} "
            "| bits in use | saturated | tensors and steps with overflow | s |",
            "|---" * (7 + len(tests)) + "|",
        ]
        for format, row in found.items():
            flex = row["flex"]
            counted = (
                (f"{flex['bits']:.1f}", f"{flex['saturated']:.1e}", f"{flex['overflows']:.2%}")
                if flex
                else ("", "", "")
            )
            cells = (
                format,
                _words(row["loss"], ".4f"),
                f"{_words(row['change'], '+.2%')} ({_spread(row['changes'].values())})",
                *(_words(row["test"][name], ".3g") for name in tests),
                *counted,
                f"{row['seconds']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _words(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(list(values)):
        return "not finite"
    return f"{min(known):+.1%} to {max(known):+.1%}"


def draw(results: Mapping[str, Any]) -> str:
    """The picture, from the results alone."""
    panels = []
    for model, found in results["models"].items():
        lines = {
            f: [(step, value) for step, value in found[f]["curve"] if value is not None]
            for f in DRAWN
        }
        panels.append(Panel(AXES[model], lines, "steps" if model != "gan" else "generator steps"))
    return picture(
        "The same trainings in seven number formats",
        "Means over five seeds. Hyperparameters are those of float32 (the wide grey line) for all; "
        "fixed-8.8 keeps one exponent for every tensor.",
        panels,
    )


def measure(
    seeds: Sequence[int], steps: int | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Train and sum up."""
    runs = train_all(seeds, steps, folder)
    settings = {
        model: {k: v for k, v in asdict(task).items() if isinstance(v, int | float)}
        for model, task in TASKS.items()
    }
    return {
        "seeds": list(seeds),
        "target": TARGET,
        "settings": settings,
        "passes": {name: format.passes for name, format in ALL.items()},
        "models": {model: summary(runs[model]) for model in TASKS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="show that it runs; keep nothing")
    parser.add_argument("--picture", action="store_true", help="draw what was kept")
    parser.add_argument("--runs", type=Path, help="a folder for single trainings")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        print(table(measure(SEEDS[:1], steps=4)))
        return
    if chosen.picture:
        results = json.loads((RESULTS / f"{NAME}.json").read_text())["results"]
    else:
        torch.set_num_threads(1)
        results = measure(SEEDS, folder=chosen.runs)
        print("kept in", keep(NAME, results).name)
    print(table(results))
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(draw(results))


if __name__ == "__main__":
    main()
