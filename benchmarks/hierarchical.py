"""Hierarchical kernel matrices: seconds, memory and error by size and dimension.

``python -m benchmarks.hierarchical PART...`` runs parts and keeps their results beside those of
others. Points are uniform in the unit cube, the kernel is the exponential one of scale 0.3, and
tolerances are relative to the Frobenius norm. Errors are measured on all entries where the dense
matrix fits, elsewhere on 200 sampled rows. Beside it is the dense matrix; and with
``peer-N --peer PYTHON``, for N points of the unit square, Htool-DDM by an interpreter that has it
(`hierarchical_peer`), at the same error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from graphopt import hierarchical as h

# Dimension, tolerance, sizes.
PARTS: dict[str, tuple[int, float, tuple[int, ...]]] = {
    "1d": (1, 1e-6, (1000, 10_000, 100_000)),
    "2d": (2, 1e-6, (1000, 10_000)),
    "2d-large": (2, 1e-6, (100_000,)),
    "3d": (3, 1e-6, (1000, 10_000)),
    "3d-loose": (3, 1e-3, (1000, 10_000)),
    "3d-large": (3, 1e-3, (100_000,)),
}
SCALE = 0.3
NAME = "hierarchical"
# Larger matrices are not compared as a whole.
MOST_DENSE = 10_000


def seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """The median; after one run that does not count."""
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def rows_of(x: Tensor, chosen: Tensor) -> Tensor:
    """[r, n] of the kernel matrix, by hand."""
    squared = sum(
        ((x[chosen, i, None] - x[None, :, i]) ** 2 for i in range(x.shape[1])),
        torch.zeros((), dtype=torch.float64),
    )
    return torch.exp(-squared.sqrt() / SCALE)


def measure(d: int, n: int, tolerance: float) -> dict[str, Any]:
    """One matrix."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, d, generator=generator, dtype=torch.float64)
    v = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    start = time.perf_counter()
    tree = h.by_points(x)
    clusters = time.perf_counter() - start
    start = time.perf_counter()
    matrix = h.from_kernel(h.Exponential(scale=SCALE), tree, tolerance=tolerance)
    build = time.perf_counter() - start
    chosen = torch.arange(n)
    if n > MOST_DENSE:
        chosen = torch.randperm(n, generator=generator)[:200].sort()[0]
    exact = torch.empty(len(chosen), n, dtype=torch.float64)
    start = time.perf_counter()
    for own in range(0, len(chosen), 16):
        exact[own : own + 16] = rows_of(x, chosen[own : own + 16])
    evaluation = time.perf_counter() - start
    product = matrix.apply(v)
    # Of random rows, the mean square of the error is that of all.
    whole = math.sqrt(n / len(chosen))
    differences = (product.value[chosen] - exact @ v).norm(dim=0) * whole
    error = difference(matrix, exact, chosen) * whole
    record: dict[str, Any] = {
        "n": n,
        "tolerance": tolerance,
        "clusters_s": clusters,
        "build_s": build,
        "matvec_s": seconds(lambda: matrix @ v[:, :1]),
        "matmat16_s": seconds(lambda: matrix @ v, 3),
        "bytes": matrix.nbytes,
        "of_dense": matrix.nbytes / (8 * n * n),
        "bound": matrix.bound / matrix.norm,
        "error": error / matrix.norm,
        "error_of_bound": error / matrix.bound,
        "product_error_of_bound": float(differences.max()) / product.bound,
        "rows_compared": len(chosen),
    }
    if n <= MOST_DENSE:
        record["dense_build_s"] = evaluation
        record["dense_matvec_s"] = seconds(lambda: exact @ v[:, :1])
    return record


def difference(matrix: h.HMatrix, exact: Tensor, chosen: Tensor) -> float:
    """The Frobenius norm of the error of some rows of a symmetric matrix."""
    total = 0.0
    for own in range(0, len(chosen), 500):
        units = torch.zeros(matrix.shape[0], len(chosen[own : own + 500]), dtype=torch.float64)
        units[chosen[own : own + 500], torch.arange(units.shape[1])] = 1
        total += float((matrix @ units - exact[own : own + 500].T).square().sum())
    return math.sqrt(total)


def gradient(n: int) -> dict[str, Any]:
    """A product's gradient in scale and variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    g, v = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    scale, variance = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (SCALE, 1.0)
    )
    kernel = h.Exponential(scale=scale, variance=variance)
    start = time.perf_counter()
    matrix = h.from_kernel(kernel, h.by_points(x), tolerance=1e-6)
    build = time.perf_counter() - start
    start = time.perf_counter()
    found = torch.autograd.grad((g * (matrix @ v)).sum(), (scale, variance))
    took = time.perf_counter() - start
    record: dict[str, Any] = {"n": n, "build_s": build, "product_and_gradient_s": took}
    if n <= MOST_DENSE:
        start = time.perf_counter()
        # Row by row: the whole graph would take gigabytes.
        expected = [torch.zeros_like(scale.detach()) for _ in range(2)]
        for own in range(0, n, 16):
            part = slice(own, own + 16)
            loss = (g[part] * (kernel(x[part], x) @ v)).sum()
            for total, found_part in zip(
                expected, torch.autograd.grad(loss, (scale, variance)), strict=True
            ):
                total += found_part
        record["dense_s"] = time.perf_counter() - start
        # A random sum of entries times products of norm 1, so that this is comparable.
        size = float(g.norm() * v.norm()) / math.sqrt(n) * matrix.norm
        record["error"] = max(
            abs(float(a - b)) / size for a, b in zip(found, expected, strict=True)
        )
    return record


def peer(n: int, python: str) -> dict[str, Any]:
    """Products of one vector in 2-D, here and by the peer with errors no larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    v = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    exact = torch.cat([rows_of(x, own) @ v for own in torch.arange(n).split(200)])
    start = time.process_time()
    matrix = h.from_kernel(h.Exponential(scale=SCALE), h.by_points(x), tolerance=1e-6)
    build = time.process_time() - start
    error = float((matrix @ v - exact).square().sum(0).mean().sqrt())
    ours = {
        "build_cpu_s": build,
        "matvec_s": seconds(lambda: matrix @ v[:, :1], 15),
        "error": error,
        "of_dense": matrix.nbytes / (8 * n * n),
    }
    theirs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data.npz"
        np.savez(data, points=x, scale=SCALE, vectors=v, products=exact)
        script = str(Path(__file__).parent / "hierarchical_peer.py")
        for eta in ("1.5", "10"):
            for epsilon in ("1e-5", "3e-6", "1e-6", "3e-7"):
                command = [python, script, data, epsilon, eta, "N", "15"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                theirs.append(json.loads(done.stdout.splitlines()[-1]))
                if theirs[-1]["error"] <= error:
                    break
    return {"n": n, "norm": matrix.norm, "ours": ours, "htool": theirs}


def slopes(records: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents of n between the last two sizes."""
    first, last = records[-2:]
    ratio = math.log(last["n"] / first["n"])
    return {
        key: round(math.log(last[key] / first[key]) / ratio, 3)
        for key in ("build_s", "matvec_s", "bytes")
    }


def merged(results: dict[str, Any]) -> dict[str, Any]:
    """With what was kept before, and slopes over all sizes of a dimension and tolerance."""
    path = harness.RESULTS / f"{NAME}.json"
    kept: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    kept |= results
    for small, large, name in (
        ("1d", "1d", "1d"),
        ("2d", "2d-large", "2d"),
        ("3d", "3d", "3d"),
        ("3d-loose", "3d-large", "3d-loose"),
    ):
        if small in kept:
            records = kept[small] + (kept.get(large, []) if large != small else [])
            kept[f"slopes {name}"] = slopes(records)
    return kept


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--peer", help="an interpreter that has Htool")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for part in arguments.parts:
        if part.startswith("gradient"):
            results[part] = gradient(int(part.split("-")[1]))
        elif part.startswith("peer"):
            results[part] = peer(int(part.split("-")[1]), arguments.peer)
        else:
            d, tolerance, sizes = PARTS[part]
            results[part] = [measure(d, n, tolerance) for n in sizes]
        print(part, json.dumps(results[part], indent=1), flush=True)
        harness.keep(NAME, merged(results))


if __name__ == "__main__":
    main()
