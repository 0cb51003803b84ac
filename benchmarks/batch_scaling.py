"""Steps to a target by batch size, for SGD, LARC, Muon and K-FAC, from 32 examples to all of them.

The convolutional network of `examples/kfac_digits` on its 1437 training images, to 98 % of the
others. Every cell of the table, a method at a batch size, is tuned for itself by the 15 trials of
`benchmarks.tuning`. Learning rates are constant, so that no length of a schedule favours a
batch size. Five other seeds are reported. No time is measured; other load does not disturb.

Run ``python -m benchmarks.batch_scaling``; it goes on where it was interrupted, ``--again`` begins
anew. It writes ``benchmarks/results/batch_scaling.json`` and ``docs/images/batch_scaling.svg``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.batch_scaling_picture import steps_over_batch
from benchmarks.convergence import IMAGES
from benchmarks.harness import keep
from benchmarks.tuning import (
    RATES,
    SEEDS,
    SETTINGS,
    TUNING_SEEDS,
    Trial,
    about_trial,
    in_words,
    kept_of,
    losses_expected,
    or_null,
    spread,
    tune,
)
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import (
    KFAC,
    LARC_SGD,
    MUON,
    SGD_MOMENTUM,
    USUAL,
    Batch,
    Task,
    train,
)

NAME = "batch_scaling"
METHODS = (SGD_MOMENTUM, LARC_SGD, MUON, KFAC)
ALL = 1437
SIZES = (32, 128, 512, ALL)
STEPS = 600  # then a run counts as lost


def task(size: int) -> Task:
    """Digits in batches of this size, at a constant learning rate."""
    images, labels, _, _ = digits.digits()

    def batches(seed: int) -> Iterator[Batch]:
        order = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(labels), generator=order).split(size):
                if len(chosen) == size:
                    yield images[chosen], labels[chosen]

    if not 0 < size <= len(labels):
        raise ValueError(f"there are batches of 1 to {len(labels)} images, not of {size}")
    return replace(digits.task(), batches=batches, steps=STEPS, decays=False)


def cell(
    task: Task,
    method: str,
    rates: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    settings: Sequence[float] = (),
) -> dict[str, Any]:
    """Tune a method, and count its steps to the target; JSON data.

    A run that never reaches it counts as infinitely long, and is ``null``.
    """
    with losses_expected():
        chosen, tried = tune(task, method, rates, tuning_seeds, settings)
        steps = [_steps(task, method, chosen, seed) for seed in seeds]
    return {
        **about_trial(chosen, rates),
        "setting is": USUAL[method][0],
        "steps": spread(steps),
        "steps by seed": [or_null(value) for value in steps],
        "tuning": tried,
    }


def _steps(task: Task, method: str, chosen: Trial, seed: int) -> float:
    for run in train(task, method, chosen.rate, seed, setting=chosen.setting):
        if run.steps_to_target is not None:
            return run.steps_to_target
    return math.inf


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the documentation: median, lowest to highest, learning rate."""
    sizes = sorted({int(size) for cells in results.values() for size in cells})
    lines = [
        "| steps to 0.98 (lowest to highest); learning rate | "
        + " | ".join("all" if size == ALL else str(size) for size in sizes)
        + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for method, cells in results.items():
        words = [_words(cells[str(size)]) if str(size) in cells else "" for size in sizes]
        lines.append(f"| {method} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def _words(found: Mapping[str, Any]) -> str:
    star = "*" if found["rate is at the edge of the grid"] else ""
    return f"{in_words(found['steps'], '.0f')}; {found['rate']:g}{star}"


def main() -> None:
    """Count, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--method", choices=METHODS, action="append", help="only these")
    parser.add_argument("--again", action="store_true", help="count what was counted, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in SIZES:
        for method in options.method or METHODS:
            if options.again or str(size) not in kept_of(NAME).get(method, {}):
                found = cell(task(size), method, RATES, TUNING_SEEDS, SEEDS, SETTINGS[method])
                print(f"{method}, {size}: {_words(found)}", flush=True)
                kept = kept_of(NAME)
                kept[method] = {**kept.get(method, {}), str(size): found}
                keep(NAME, {m: kept[m] for m in METHODS if m in kept})
    print(table(kept_of(NAME)))
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / f"{NAME}.svg").write_text(steps_over_batch(kept_of(NAME)))


if __name__ == "__main__":
    main()
