"""Accuracy with delayed gradients: SGD with momentum, SC, LWP, both, and Adaptive Braking.

The training is that of `examples/pipeline/delay_study.py`. Learning rate: the best of a few for
training *without* delay and with batches of 32, with two tuning seeds; every method uses it, scaled
to the images per update. Then three other seeds train without delay, with the delays of a pipeline
that is never drained, and with one delay for all weights. Seeds fix weights and the order of
images, so methods are compared in pairs.

Targets: LWP + SC wins back 80 % of the accuracy that SGD with momentum loses in the pipeline, and
Adaptive Braking is better than SGD with momentum where all weights are 32 updates late.

Run ``python -m benchmarks.delay_study`` (about 20 minutes of one core, with ``--jobs`` of several;
nothing is timed, so the machine need not be idle). It writes
``benchmarks/results/delay_study.json`` and the picture; ``--picture`` draws it from that file
again, and ``--quick`` shows in a minute that all of it runs. An interrupted study goes on with
``--resume FILE``, which gets a line for each training.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.delay_study_picture import Spread, accuracy_over_delay
from benchmarks.harness import RESULTS, keep
from examples.pipeline.delay_study import (
    BOTH,
    BOTH_WEIGHTS,
    BRAKING,
    PLAIN,
    SPIKE,
    Digits,
    Setting,
    constant,
    pipelined,
    use_one_core,
)

Place = tuple[str, int | None]  # a method, and the delay of all weights or None for a pipeline's

NAME = "delay_study"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
RATES = (0.01, 0.02, 0.05, 0.1)
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2)
BATCHES = (2, 8, 4)  # images per update in the pipeline
BATCH = 8  # with one delay for all weights
DELAYS = (8, 32, 128)
PIPELINE = (PLAIN, SPIKE, "LWP", BOTH, BOTH_WEIGHTS)
CONSTANT = (PLAIN, SPIKE, "LWP", BOTH, BRAKING)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile by number of seeds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval of the mean by Student's t, and the values themselves."""
    mean = statistics.mean(values)
    half = math.nan
    if len(values) in STUDENT:
        half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {
        "mean": round(mean, 4),
        "interval": [round(mean - half, 4), round(mean + half, 4)] if half == half else None,
        "values": [round(value, 4) for value in values],
    }


def differences(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
    """`spread` of paired differences."""
    return spread([b - w for b, w in zip(better, worse, strict=True)])


def recovered(
    method: Sequence[float], plain: Sequence[float], undelayed: Sequence[float]
) -> float | None:
    """The part of what the delay cost that the method has; ``None`` if it cost nothing."""
    lost = statistics.mean(undelayed) - statistics.mean(plain)
    gained = statistics.mean(method) - statistics.mean(plain)
    return round(gained / lost, 3) if lost > 0 else None


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        setting: of the training.
        method: one of the methods.
        delay: of all weights, in updates; ``None`` for those of the pipeline.
        seed: of weights and order.
    """

    setting: Setting
    method: str
    delay: int | None
    seed: int

    def accuracy(self) -> float:
        """Train, and measure."""
        use_one_core()
        data = Digits.load()
        if self.delay is None:
            found = pipelined(data, self.setting, self.method, self.seed)
        else:
            found = constant(data, self.setting, self.method, self.delay, self.seed)
        place = "pipeline" if self.delay is None else f"delay {self.delay}"
        words = f"{place}, {self.method}, batch {self.setting.batch}, lr {self.setting.lr:g}"
        print(f"{time.strftime('%H:%M:%S')} {words}, seed {self.seed}: {found:.4f}", flush=True)
        return found


class Runner:
    """Trains side by side, and skips what a file says is done.

    Args:
        jobs: trainings at a time.
        file: gets a line for each training that ends; ``None`` for no file.
    """

    def __init__(self, jobs: int, file: Path | None = None) -> None:
        self.jobs = jobs
        self.file = file
        self._done: dict[str, float] = {}
        if file is not None and file.exists():
            lines = [json.loads(text) for text in file.read_text().splitlines()]
            self._done = {json.dumps(entry["run"]): entry["accuracy"] for entry in lines}

    def __call__(self, runs: Sequence[Run]) -> dict[Run, float]:
        """The accuracy of each."""
        missing = [run for run in runs if json.dumps(asdict(run)) not in self._done]
        if missing:
            with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
                for run, accuracy in zip(missing, pool.map(self.one, missing), strict=True):
                    self._done[json.dumps(asdict(run))] = accuracy
        return {run: self._done[json.dumps(asdict(run))] for run in runs}

    def one(self, run: Run) -> float:
        """One training, in a process of its own."""
        accuracy = run.accuracy()
        if self.file is not None:
            with self.file.open("a") as lines:
                lines.write(json.dumps({"run": asdict(run), "accuracy": accuracy}) + "\n")
        return accuracy


class Study:
    """All trainings with one setting.

    Args:
        setting: the batch size is replaced.
        seeds: of weights and order.
        runner: trains.
    """

    def __init__(self, setting: Setting, seeds: Sequence[int], runner: Runner) -> None:
        self.setting = setting
        self.seeds = seeds
        self.runner = runner

    def accuracies(
        self, batch: int, places: Sequence[Place]
    ) -> tuple[list[float], dict[Place, list[float]]]:
        """Without delay, and by method and delay; in the order of the seeds."""
        setting = replace(self.setting, batch=batch)
        wanted = [(PLAIN, 0), *places]
        runs = [
            Run(setting, method, delay, seed) for method, delay in wanted for seed in self.seeds
        ]
        found = self.runner(runs)
        values = {
            place: [found[Run(setting, *place, seed)] for seed in self.seeds] for place in wanted
        }
        return values.pop((PLAIN, 0)), values

    def pipeline(self, batch: int) -> dict[str, Any]:
        """What is kept of the trainings with a pipeline's delays."""
        undelayed, found = self.accuracies(batch, [(method, None) for method in PIPELINE])
        plain = found[PLAIN, None]
        others = {method: values for (method, _), values in found.items() if method != PLAIN}
        return {
            "undelayed": spread(undelayed),
            "accuracy": {method: spread(values) for (method, _), values in found.items()},
            "lost": differences(undelayed, plain),
            "over_plain": {method: differences(values, plain) for method, values in others.items()},
            "recovered": {
                method: recovered(values, plain, undelayed) for method, values in others.items()
            },
        }

    def constant(self, batch: int, delays: Sequence[int]) -> dict[str, Any]:
        """What is kept of the trainings with one delay for all weights."""
        places: list[Place] = [(method, delay) for delay in delays for method in CONSTANT]
        undelayed, found = self.accuracies(batch, places)
        return {
            "batch": batch,
            "undelayed": spread(undelayed),
            "accuracy": {
                method: {str(delay): spread(found[method, delay]) for delay in delays}
                for method in CONSTANT
            },
            "over_plain": {
                method: {
                    str(delay): differences(found[method, delay], found[PLAIN, delay])
                    for delay in delays
                }
                for method in CONSTANT
                if method != PLAIN
            },
        }


def picture(results: Mapping[str, Any]) -> str:
    """The SVG for kept results."""

    def drawn(found: Mapping[str, Any]) -> Spread:
        return Spread(found["mean"], min(found["values"]), max(found["values"]))

    setting, fixed = results["setting"], results["constant"]
    stages = Setting(blocks=setting["blocks"]).stages
    return accuracy_over_delay(
        "Accuracy with delayed gradients",
        f"scikit-learn's digits, ResNet of {stages} stages, {setting['epochs']} epochs. Points are"
        f" means of {len(results['seeds'])} seeds, bars their range. The learning rate was chosen"
        f" without delay. Right: {fixed['batch']} images per update.",
        (
            {int(b): found["undelayed"]["mean"] for b, found in results["pipeline"].items()},
            fixed["undelayed"]["mean"],
        ),
        {
            method: {
                int(batch): drawn(found["accuracy"][method])
                for batch, found in results["pipeline"].items()
            }
            for method in PIPELINE
        },
        {
            method: {int(delay): drawn(of) for delay, of in by_delay.items()}
            for method, by_delay in fixed["accuracy"].items()
        },
    )


def main() -> None:
    """Run, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", action="store_true", help="only draw what is kept")
    parser.add_argument("--quick", action="store_true", help="keep nothing")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--resume", type=Path, help="a file of trainings done, to go on with")
    chosen = parser.parse_args()
    if chosen.picture:
        kept = json.loads((RESULTS / f"{NAME}.json").read_text())["results"]
        (IMAGES / f"{NAME}.svg").write_text(picture(kept))
        return
    runner = Runner(chosen.jobs, chosen.resume)
    if chosen.quick:
        quick = Study(Setting(epochs=1), SEEDS[:2], runner)
        print(json.dumps([quick.pipeline(50), quick.constant(50, DELAYS[:1])], indent=1))
        return
    setting = Setting(batch=Setting.tuned)
    rates = {rate: replace(setting, lr=rate) for rate in RATES}
    trials = [Run(tried, PLAIN, 0, seed) for tried in rates.values() for seed in TUNING_SEEDS]
    found = runner(trials)
    tuned = {
        rate: statistics.mean(found[Run(tried, PLAIN, 0, seed)] for seed in TUNING_SEEDS)
        for rate, tried in rates.items()
    }
    setting = rates[max(tuned, key=lambda rate: tuned[rate])]
    study = Study(setting, SEEDS, runner)
    fixed = study.constant(BATCH, DELAYS)
    pipeline = {}
    for batch in BATCHES:
        pipeline[str(batch)] = study.pipeline(batch)
        results = {
            "setting": asdict(setting),
            "seeds": SEEDS,
            "tuning": {
                "seeds": TUNING_SEEDS,
                "accuracy": {f"{rate:g}": round(value, 4) for rate, value in tuned.items()},
            },
            "pipeline": pipeline,
            "constant": fixed,
        }
        print(keep(NAME, results), flush=True)  # each time: what is done is not lost
        (IMAGES / f"{NAME}.svg").write_text(picture(json.loads(json.dumps(results))))


if __name__ == "__main__":
    main()
