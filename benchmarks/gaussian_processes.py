"""Log-likelihood and gradient of Gaussian processes: hierarchical, dense, and by GPyTorch.

Each case runs in a process of its own, for its peak of memory. Seconds are of the wall clock with
two threads, and CPU seconds beside them, which tell more where the machine was not idle.

    python -m benchmarks.gaussian_processes run ours 10000 2 [TOLERANCE]   one case, one line
    python -m benchmarks.gaussian_processes run dense 10000 2
    python -m benchmarks.gaussian_processes run cholesky|iterative|keops 10000 2 PYTHON [ITERATIONS]
    python -m benchmarks.gaussian_processes table LINES                    keeps them, with errors

Lines are JSON. PYTHON is an interpreter with gpytorch, and with pykeops for ``keops``. LINES is a
file of such lines.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import keep
from graphopt.hierarchical.kernels import Matern32
from graphopt.hierarchical.processes.gaussian_process import GaussianProcess

SCALES = {1: 0.1, 2: 0.2, 3: 0.4}
VARIANCE, NOISE = 1.0, 0.1


def data(n: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Points in the unit cube, and values of two waves with noise."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(n, dimensions, dtype=torch.float64, generator=generator)
    noise = NOISE**0.5 * torch.randn(n, dtype=torch.float64, generator=generator)
    return points, torch.sin(6 * points.sum(1)) + torch.cos(5 * points[:, 0]) + noise


def hyperparameters(dimensions: int) -> list[Tensor]:
    """Scale, variance, noise."""
    values = (SCALES[dimensions], VARIANCE, NOISE)
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def ours(n: int, dimensions: int, tolerance: float) -> dict[str, Any]:
    points, values = data(n, dimensions)
    scale, variance, noise = hyperparameters(dimensions)
    clock = _Clock()
    process = GaussianProcess(Matern32(scale, variance), noise, points, tolerance=tolerance)
    inverse = process.inverse()
    clock.stage("matrix and factor")
    found = process.log_likelihood(values)
    clock.stage("solution")
    forward = clock.total
    found.value.backward()
    clock.stage("gradient")
    seconds, cpu = clock.total
    line = {
        "value": float(found.value.detach()),
        "bound": found.bound,
        "tolerance": tolerance,
        "gradient": [float(p.grad) for p in (scale, variance, noise) if p.grad is not None],
        "forward seconds": forward[0],
        "forward CPU seconds": forward[1],
        "seconds": seconds,
        "CPU seconds": cpu,
        "stages": clock.stages,
        "ranks": inverse.whitening.ranks,
        "factor GiB": inverse.whitening.nbytes / 2**30,
        "matrix bound": inverse.operator.bound,
    }
    # Bounds of the gradient are not counted, and come last.
    print(json.dumps(line), file=sys.stderr, flush=True)
    line["gradient bounds"] = [own.bound for own in process.gradient(values).values()]
    clock.stage("bounds of the gradient, not counted")
    return line


class _Clock:
    """Seconds of stages, and CPU seconds."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._start = self._last = time.perf_counter(), time.process_time()

    def stage(self, name: str) -> None:
        """The end of one; its peak of memory so far, too."""
        now = time.perf_counter(), time.process_time()
        self.stages[name] = {
            "seconds": now[0] - self._last[0],
            "CPU seconds": now[1] - self._last[1],
            "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(name, self.stages[name], file=sys.stderr, flush=True)
        self._last = now

    @property
    def total(self) -> tuple[float, float]:
        """Since the start."""
        return self._last[0] - self._start[0], self._last[1] - self._start[1]


def dense(n: int, dimensions: int) -> dict[str, Any]:
    points, values = data(n, dimensions)
    scale, variance, noise = hyperparameters(dimensions)
    start = time.perf_counter(), time.process_time()
    matrix = Matern32(scale, variance)(points, points) + noise * torch.eye(n, dtype=torch.float64)
    factor = torch.linalg.cholesky(matrix)
    white = torch.linalg.solve_triangular(factor, values.unsqueeze(1), upper=False)
    determinant = 2 * factor.diagonal().log().sum()
    value = (white.square().sum() + determinant + n * math.log(2 * math.pi)) / -2
    value.backward()
    return {
        "value": float(value.detach()),
        "gradient": [float(p.grad) for p in (scale, variance, noise) if p.grad is not None],
        "seconds": time.perf_counter() - start[0],
        "CPU seconds": time.process_time() - start[1],
    }


def peer(mode: str, n: int, dimensions: int, python: str, rest: list[str]) -> dict[str, Any]:
    points, values = data(n, dimensions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.pt"
        kept = {"points": points, "values": values, "scale": SCALES[dimensions]}
        torch.save({**kept, "variance": VARIANCE, "noise": NOISE}, path)
        script = Path(__file__).with_name("gaussian_processes_peer.py")
        done = subprocess.run(
            [python, script, path, mode, *rest], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(kind: str, n: int, dimensions: int, rest: list[str]) -> None:
    load = round(os.getloadavg()[0], 2)
    if kind == "ours":
        found = ours(n, dimensions, float(rest[0]) if rest else 1e-6)
    elif kind == "dense":
        found = dense(n, dimensions)
    else:
        found = peer(kind, n, dimensions, rest[0], rest[1:])
    if kind in ("ours", "dense"):
        found["GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    threads = torch.get_num_threads()
    head = {"kind": kind, "n": n, "dimensions": dimensions, "threads": threads, "load": load}
    print(json.dumps({**head, **found}), flush=True)


def table(path: str) -> None:
    """Errors against dense factors where there are any, and whether they are inside the bounds."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line[:1] == "{"]
    exact = {(line["n"], line["dimensions"]): line for line in lines if line["kind"] == "dense"}
    for line in lines:
        known = exact.get((line["n"], line["dimensions"]))
        if known is None or line is known:
            continue
        line["error"] = abs(line["value"] - known["value"])
        if "bound" in line:
            line["inside the bound"] = line["error"] <= line["bound"]
        if "gradient" in line:
            pairs = zip(line["gradient"], known["gradient"], strict=True)
            errors = [abs(a - b) for a, b in pairs]
            line["gradient error"] = max(errors)
            if "gradient bounds" in line:
                pairs = zip(errors, line["gradient bounds"], strict=True)
                line["gradient inside the bounds"] = all(error <= most for error, most in pairs)
    print(keep("gaussian_processes", lines))


if __name__ == "__main__":
    if sys.argv[1] == "table":
        table(sys.argv[2])
    else:
        run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
