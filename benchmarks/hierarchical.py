"""Hierarchical kernel matrices: seconds, memory and error by size and dimension.

``python -m benchmarks.hierarchical PART...`` runs parts and keeps their results beside those of
others; ``python -m benchmarks.hierarchical --peer PYTHON`` also runs h2tools by an interpreter that
has it. Points are uniform in the unit cube, the kernel is the exponential one of scale 0.3, and
tolerances are relative to the Frobenius norm. Errors are measured on 200 sampled rows in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

PEER = """
import json, sys, time
import numpy as np
from h2tools import Problem, ClusterTree
from h2tools.collections import particles
from h2tools.mcbh import mcbh

n, tau = int(sys.argv[1]), float(sys.argv[2])
points = np.load(sys.argv[3]).T.copy()
x = np.load(sys.argv[4])

def entries(row_data, rows, column_data, columns):
    a = row_data.vertex[:, rows].T
    b = column_data.vertex[:, columns].T
    squared = sum((a[:, i][:, None] - b[:, i][None, :]) ** 2 for i in range(a.shape[1]))
    return np.exp(-np.sqrt(squared) / 0.3)

data = particles.Particles(2, n, points)
tree = ClusterTree(data, 64)
problem = Problem(entries, tree, tree, symmetric=1, verbose=0)
start = time.perf_counter()
matrix = mcbh(problem, tau=tau, iters=1, verbose=0)
build = time.perf_counter() - start
product = matrix.dot(x)
seconds = []
for _ in range(5):
    start = time.perf_counter()
    matrix.dot(x)
    seconds.append(time.perf_counter() - start)
np.save(sys.argv[5], product)
print(json.dumps({"build": build, "matvec": sorted(seconds)[2]}))
"""


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
    chosen = torch.randperm(n, generator=generator)[:200]
    exact = rows_of(x, chosen)
    product = matrix.apply(v)
    error = (product.value[chosen] - exact @ v).norm(dim=0) * math.sqrt(n / len(chosen))
    # Gaussian vectors: the mean square of the error is that of the matrix, row by row.
    matrix_error = float(error.square().mean().sqrt())
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
        "error": matrix_error / matrix.norm,
        "error_of_bound": matrix_error / matrix.bound,
        "product_error_of_bound": float(error.max()) / product.bound,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if n <= 10_000:
        start = time.perf_counter()
        dense = h.Exponential(scale=SCALE)(x, x)
        record["dense_build_s"] = time.perf_counter() - start
        record["dense_matvec_s"] = seconds(lambda: dense @ v[:, :1])
    return record


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
    if n <= 10_000:
        start = time.perf_counter()
        expected = torch.autograd.grad((g * (kernel(x, x) @ v)).sum(), (scale, variance))
        record["dense_s"] = time.perf_counter() - start
        # A random sum of entries times products of norm 1, so that this is comparable.
        size = float(g.norm() * v.norm()) / math.sqrt(n) * matrix.norm
        record["error"] = max(
            abs(float(a - b)) / size for a, b in zip(found, expected, strict=True)
        )
    return record


def peer(python: str, n: int, tolerance: float, folder: Path) -> dict[str, Any]:
    """The multicharge basis method of h2tools on the same points."""
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    v = torch.randn(n, 16, generator=generator, dtype=torch.float64)[:, 0]
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(folder / name) for name in ("points.npy", "vector.npy", "product.npy")]
    np.save(names[0], x.numpy())
    np.save(names[1], v.numpy())
    done = subprocess.run(
        [python, "-c", PEER, str(n), str(tolerance), *names],
        capture_output=True,
        text=True,
        check=True,
    )
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    chosen = torch.randperm(n, generator=generator)[:200]
    exact = rows_of(x, chosen) @ v
    product = torch.from_numpy(np.load(names[2]))[chosen]
    record |= {"n": n, "tau": tolerance}
    record["product_error"] = float((product - exact).norm() / exact.norm())
    return record


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
    parser.add_argument("--peer", help="an interpreter with h2tools")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for part in arguments.parts:
        if part.startswith("gradient"):
            results[part] = gradient(int(part.split("-")[1]))
        else:
            d, tolerance, sizes = PARTS[part]
            results[part] = [measure(d, n, tolerance) for n in sizes]
        print(part, json.dumps(results[part], indent=1), flush=True)
        harness.keep(NAME, merged(results))
    if arguments.peer:
        folder = Path(arguments.peer).resolve().parent.parent / "exchange"
        results["h2tools"] = [
            peer(arguments.peer, n, tau, folder) for n, tau in ((1000, 1e-6), (10_000, 1e-6))
        ]
        print(json.dumps(results["h2tools"], indent=1))
        harness.keep(NAME, merged(results))


if __name__ == "__main__":
    main()
