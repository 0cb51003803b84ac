"""Measure variants side by side: alternating runs, medians of paired ratios, JSON results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Run = Callable[[], object]


def alternate(variants: Mapping[str, Run], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each run; every round runs each variant once, in random order."""
    for run in variants.values():
        for _ in range(warmup):
            run()
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            _synchronize()
            start = time.perf_counter()
            variants[name]()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median of the paired ratios ``name / base`` with a 95 % bootstrap interval."""
    pairs = [a / b for a, b in zip(times[name], times[base], strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(pairs, k=len(pairs))) for _ in range(1000))
    return {
        "median": round(statistics.median(pairs), 4),
        "low": round(medians[25], 4),
        "high": round(medians[975], 4),
    }


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median milliseconds of each variant."""
    return {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}


def keep(name: str, results: object) -> Path:
    """Write ``results/<name>.json`` with date, commit, versions and machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=RESULTS.parent,
    ).stdout.strip()
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
