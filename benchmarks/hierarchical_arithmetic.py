"""Arithmetic of matrices in blocks: seconds, memory and bounds as n grows, beside dense ones.

Run ``python -m benchmarks.hierarchical_arithmetic CASE`` on an otherwise idle machine, for each of
`CASES`; results go to ``benchmarks/results/hierarchical_arithmetic_CASE.json``. Every size runs
once, smallest first, after one run of the smallest that does not count. Slopes are the exponents of
n between the last two sizes. Up to n = 1000 everything is compared with dense float64, and the
ratios of bounds and errors are kept. Dense operations are timed up to n = 4000.

Targets: slopes of at most 1.5 on the line, and of at most 2 in the square, where at these sizes
most of a matrix is near its diagonal; errors within their bounds always.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import keep
from graphopt.hierarchical import HMatrix, Matern32, Strong, Weak, by_points, from_kernel
from graphopt.hierarchical.arithmetic.algebra import add, shifted
from graphopt.hierarchical.arithmetic.factorization import Factorization
from graphopt.hierarchical.arithmetic.factorize import cholesky, lu
from graphopt.hierarchical.arithmetic.inverses import inverse
from graphopt.hierarchical.arithmetic.products import multiply
from graphopt.hierarchical.arithmetic.triangular import Corner, Triangle
from graphopt.hierarchical.blocks import placed

TOLERANCE = 1e-6
COMPARED, DENSE = 1000, 4000


@dataclass(frozen=True)
class Case:
    """Points, structure and sizes; products only up to a size of their own."""

    dimensions: int
    rule: Strong | Weak
    leaf: int
    sizes: tuple[int, ...]
    products: int


CASES = {
    "weak": Case(1, Weak(), 64, (500, 1000, 2000, 4000), 4000),
    "line": Case(1, Strong(), 64, (500, 1000, 2000, 4000, 8000), 8000),
    "square": Case(2, Strong(), 128, (500, 1000, 2000, 4000, 8000), 4000),
}


def made(case: Case, n: int) -> tuple[Tensor, HMatrix]:
    """Random points, and the Matern kernel of them with 1 added to its diagonal."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(n, case.dimensions, dtype=torch.float64, generator=generator)
    tree = by_points(points, case.leaf)
    kernel = from_kernel(Matern32(0.3), tree, tolerance=TOLERANCE, rule=case.rule)
    return points, shifted(kernel, 1.0)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and seconds."""
    start = time.perf_counter()
    found = run()
    return found, time.perf_counter() - start


def measured(case: Case, n: int) -> dict[str, Any]:
    """All operations at one size."""
    points, matrix = made(case, n)
    operations: dict[str, Callable[[], Any]] = {"add": lambda: add(matrix, matrix, TOLERANCE)}
    if n <= case.products:
        operations["multiply"] = lambda: multiply(matrix, matrix, TOLERANCE)
    operations["lu"] = lambda: lu(matrix, TOLERANCE)
    operations["cholesky"] = lambda: cholesky(matrix, TOLERANCE)
    found, seconds = {}, {}
    for name, run in operations.items():
        found[name], seconds[name] = timed(run)
    factors: Factorization = found["cholesky"]
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, seconds["norms of the inverse"] = timed(lambda: factors.norms)
    solution, seconds["solve"] = timed(lambda: factors.solve(b))
    value = factors.logdet()
    record = {
        "n": n,
        "seconds": {name: round(s, 4) for name, s in seconds.items()},
        "bytes": {
            "matrix": matrix.nbytes,
            "cholesky": _bytes(factors.factors.lower),
            "dense": 8 * n * n,
        },
        "relative bounds": {
            "matrix": matrix.bound / matrix.norm,
            "cholesky": factors.bound / matrix.norm,
            "solve": solution.bound / float(solution.value.norm()),
            "logdet": value.bound / abs(value.value),
        },
    }
    if n <= DENSE:
        record["dense seconds"] = _dense_seconds(points)
    if n <= COMPARED:
        found["inverse"] = inverse(factors, TOLERANCE)
        record["bounds over errors"] = compared(points, found, b)
    return record


def compared(points: Tensor, found: dict[str, Any], b: Tensor) -> dict[str, float]:
    """Ratios of bounds and errors, which are against dense float64."""
    exact = _dense(points)
    pairs = {}
    if "multiply" in found:
        pairs["multiply"] = (found["multiply"].dense() - exact @ exact, found["multiply"].bound)
    pairs["add"] = (found["add"].dense() - 2 * exact, found["add"].bound)
    pairs["inverse"] = (found["inverse"].dense() - torch.linalg.inv(exact), found["inverse"].bound)
    for name in ("lu", "cholesky"):
        factors = found[name]
        solution, value = factors.solve(b), factors.logdet()
        pairs[f"{name} solve"] = (solution.value - torch.linalg.solve(exact, b), solution.bound)
        far = torch.tensor(value.value, dtype=torch.float64) - torch.linalg.slogdet(exact)[1]
        pairs[f"{name} logdet"] = (far, value.bound)
    ratios = {}
    for name, (far, bound) in pairs.items():
        error = float(far.norm())
        assert error <= bound, f"{name}: {error} > {bound}"
        ratios[name] = round(bound / max(error, 1e-15), 2)
    return ratios


def slopes(records: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents of n in seconds and bytes between the last two sizes that have both."""
    found = {}
    for kind in ("seconds", "bytes"):
        for name in records[-1][kind] | records[-2][kind]:
            have = [r for r in records if name in r[kind]][-2:]
            growth = have[1][kind][name] / have[0][kind][name]
            size = f"{have[0]['n']} to {have[1]['n']}"
            found[f"{kind}, {name}, {size}"] = round(
                math.log(growth) / math.log(have[1]["n"] / have[0]["n"]), 2
            )
    return found


def _dense(points: Tensor) -> Tensor:
    distances = (points.unsqueeze(1) - points).square().sum(2).sqrt() * (3**0.5 / 0.3)
    return (1 + distances) * (-distances).exp() + torch.eye(len(points), dtype=points.dtype)


def _dense_seconds(points: Tensor) -> dict[str, float]:
    values = _dense(points)
    runs: dict[str, Callable[[], Any]] = {
        "multiply": lambda: values @ values,
        "lu": lambda: torch.linalg.lu_factor(values),
        "cholesky": lambda: torch.linalg.cholesky(values),
    }
    return {name: round(timed(run)[1], 4) for name, run in runs.items()}


def _bytes(operator: Triangle) -> int:
    if isinstance(operator, Corner):
        return operator.values.numel() * operator.values.element_size()
    blocks = [p.block for line in operator.below for b in line for p in placed(b)]
    tensors = [t for block in blocks for t in vars(block).values() if isinstance(t, Tensor)]
    own = sum(t.numel() * t.element_size() for t in tensors)
    return own + sum(_bytes(inner) for inner in operator.diagonal)


def main(name: str) -> None:
    """Measure one case and keep it."""
    case, load = CASES[name], os.getloadavg()
    measured(case, case.sizes[0])
    records = [measured(case, n) for n in case.sizes]
    results = {
        "tolerance": TOLERANCE,
        "kernel": "Matern 3/2, scale 0.3, 1 added to the diagonal, float64",
        "dimensions": case.dimensions,
        "admissibility": str(case.rule),
        "leaf": case.leaf,
        "load before": load,
        "sizes": records,
        "slopes": slopes(records),
    }
    print(keep(f"hierarchical_arithmetic_{name}", results))


if __name__ == "__main__":
    main(sys.argv[1])
