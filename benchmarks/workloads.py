"""Train every scientific workload with three seeds, and hold each against its criteria.

Run ``make workloads``, or ``python -m benchmarks.workloads NAME ...`` for some of them; the others
keep what they had. Two seeds run side by side, on one core each. The results go to
``benchmarks/results/workloads.json``, the figures of seed 0 to ``docs/images``, and the tables into
``docs/workloads.md``. An interrupted call goes on where it was with ``--resume``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, keep
from benchmarks.workloads_table import DOCUMENT, with_criteria

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WORKLOADS = (
    "data_assimilation",
    "materials_imaging",
    "climate_segmentation",
    "speech",
    "neural_populations",
    "spatiotemporal",
    "inverse_jacobian",
    "inverse_tikhonov",
    "inverse_imaging",
    "unknown_operator",
    "noise_scale",
    "large_batch",
)
SEEDS = (0, 1, 2)
# Data-parallel, as its paper trained it; its ranks take both cores.
RANKS = {"materials_imaging": 2}


def main() -> None:
    """Run what was asked for, then write results, figures and tables."""
    options = _options()
    if not options.collect:
        _train_all(options)
    path = RESULTS / "workloads.json"
    kept = json.loads(path.read_text())["results"] if path.exists() else {}
    found = {name: dict(_collected(name, options.output)) for name in options.names}
    results = {name: (kept | found)[name] for name in WORKLOADS if name in kept | found}
    keep("workloads", results)
    for name in options.names:
        for figure in (options.output / f"{name}-0").glob("figure.*"):
            shutil.copy(figure, IMAGES / f"workload_{name}{figure.suffix}")
    DOCUMENT.write_text(with_criteria(DOCUMENT.read_text(), results))


def _train_all(options: argparse.Namespace) -> None:
    alone = [name for name in options.names if name in RANKS]
    beside = [name for name in options.names if name not in RANKS]
    start = time.monotonic()
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [(name, seed) for name in beside for seed in SEEDS]
        list(pool.map(lambda job: _train(*job, options), jobs))
    for name in alone:
        for seed in SEEDS:
            _train(name, seed, options)
    print(f"all trainings: {time.monotonic() - start:.0f} s", flush=True)


def _train(name: str, seed: int, options: argparse.Namespace) -> None:
    folder = options.output / f"{name}-{seed}"
    module = f"graphopt.examples.{name}.train"
    launcher = [sys.executable, "-m"]
    if name in RANKS:
        launcher += ["torch.distributed.run", "--nproc-per-node", str(RANKS[name]), "-m"]
    command = [*launcher, module, "--seed", str(seed), "--output", str(folder)]
    command += ["--device", options.device]
    if options.resume and (folder / "checkpoint.pt").exists():
        command.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    print(f"{name}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        tail = (folder / "log.txt").read_text()[-2000:]
        raise SystemExit(f"{name} with seed {seed} ended with {done.returncode}:\n{tail}")


def _collected(name: str, output: Path) -> Iterator[tuple[str, Any]]:
    """What the seeds of one workload have found; date and commit, since others may be older."""
    yield "date", datetime.datetime.now(datetime.UTC).date().isoformat()
    yield "commit", _commit()
    yield (
        "seeds",
        {
            str(seed): json.loads((output / f"{name}-{seed}" / "results.json").read_text())
            for seed in SEEDS
        },
    )


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return done.stdout.strip()


def _known(name: str) -> str:
    if name not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(WORKLOADS)}")
    return name


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", type=_known, metavar="NAME", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "workloads")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--collect", action="store_true", help="what is there; train nothing")
    options = parser.parse_args()
    options.names = options.names or list(WORKLOADS)
    options.output = options.output.absolute()
    return options


if __name__ == "__main__":
    main()
