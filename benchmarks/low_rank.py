"""Layers in factors against dense ones: what `low_rank` chooses, and what it costs and gains.

Operators with a geometry (mixing of tokens by a smooth kernel, by two that are smooth off the
diagonal only, by a long convolution) and ordinary layers, fresh and trained. Each layer is one
linear map of `COLUMNS` vectors; a step is forward and backward by graphopt's eager backend, dense
(``cleanup``) and as the pass leaves it (``low_rank,cleanup``), in alternating runs of one process;
medians of paired ratios with bootstrap intervals. Run ``python -m benchmarks.low_rank`` on an
otherwise idle machine; results go to ``benchmarks/results/low_rank.json``, with the load of the
machine when each layer began. ``--layer`` and ``--tokens`` measure some of them, beside what was
kept of the others.

Targets, stated before measuring: at least 2 times faster than dense on each operator with a
geometry at 2048 tokens, within the tolerance; ordinary layers stay dense.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.harness import RESULTS, alternate, keep, milliseconds, ratio
from graphopt.model.surface import report

TOLERANCE = 1e-3
COLUMNS = 128
ROUNDS = {1024: 21, 2048: 15, 4096: 9}
THREADS = 1


def gaussian(n: int) -> Tensor:
    """Smooth everywhere: exp(-|x - y|^2 / 0.05) of random points in [0, 1]."""
    x = _points(n)
    return torch.exp(-((x[:, None] - x) ** 2) / 0.05) / n


def exponential(n: int) -> Tensor:
    """With a kink on the diagonal: exp(-10 |x - y|) of random points, in their order."""
    x = _points(n)
    return torch.exp(-10 * (x[:, None] - x).abs()) / n


def inverse_distance(n: int) -> Tensor:
    """With a peak on the diagonal: 1 / (|x - y| + 1 / n) of random points, in their order."""
    x = _points(n)
    return 1 / ((x[:, None] - x).abs() + 1 / n) / n**1.5


def convolution(n: int) -> Tensor:
    """Causal, as long as the sequence, with taps that decay and have no other structure."""
    taps = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    taps *= torch.exp(-4 * torch.arange(n) / n) / n**0.5
    d = torch.arange(n)[:, None] - torch.arange(n)
    return torch.where(d >= 0, taps[d.clamp(min=0)], 0.0)


def _points(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, generator=generator, dtype=torch.float64).sort()[0]


KERNELS: dict[str, Callable[[int], Tensor]] = {
    "gaussian kernel": gaussian,
    "exponential kernel": exponential,
    "inverse distance": inverse_distance,
    "long convolution": convolution,
}


def _layer(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def trained() -> nn.Module:
    """Four hidden layers of 512 after 600 steps of Adam on digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    torch.manual_seed(0)
    hidden = [m for _ in range(3) for m in (nn.Linear(512, 512), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), *hidden, nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(600):
        rows = torch.randint(0, len(x), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def case(model: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    """What the pass does to a model, and a step with and without it."""
    dense = copy.deepcopy(model)
    options: dict[str, Any] = {"backend": "eager", "verify": "eager"}
    graphopt.optimize(dense, (x,), passes="cleanup", **options)
    start = time.perf_counter()
    spec = f"low_rank{{tolerance={TOLERANCE}}},cleanup"
    graphopt.optimize(model, (x,), passes=spec, **options)
    seconds = time.perf_counter() - start
    step = report(model).specialisations[0].steps[0]
    found: dict[str, Any] = {
        "optimize_seconds": round(seconds, 2),
        "table": list(step.outcome.tables.get("weights", ())),
        "declined": {d.site: d.reason for d in step.outcome.declined},
        "parameters": _count(model) / _count(dense),
    }
    if step.outcome.applied:
        with torch.no_grad():
            want, have = dense(x), model(x)
        found["output_error"] = float((have - want).norm() / want.norm())
        times = alternate({"dense": _step(dense, x), "factors": _step(model, x)}, rounds)
        found |= {"ms": milliseconds(times), "speedup": ratio(times, "dense", "factors")}
    return found


def _step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    tangent: list[Tensor] = []

    def step() -> None:
        model.zero_grad(set_to_none=True)
        out = model(x)
        if not tangent:
            tangent.append(torch.ones_like(out))
        out.backward(tangent[0])

    return step


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fresh(n: int) -> Tensor:
    """As `nn.Linear` begins."""
    generator = torch.Generator().manual_seed(2)
    return (2 * torch.rand(n, n, generator=generator) - 1) * n**-0.5


def main() -> None:
    """Measure, print and keep."""
    layers: dict[str, Callable[[int], Tensor]] = {**KERNELS, "fresh layer": fresh}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layer", choices=[*layers, "trained"], action="append")
    parser.add_argument("--tokens", type=int, choices=ROUNDS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    chosen = options.layer or [*layers, "trained"]
    found: dict[str, Any] = {}
    for n in options.tokens or ROUNDS:
        x = torch.randn(COLUMNS, n, generator=torch.Generator().manual_seed(1))
        for name in [name for name in layers if name in chosen]:
            found[f"{name}, {n}"] = _told(name, n, _layer(layers[name](n)), x)
    if "trained" in chosen:
        x = torch.rand(COLUMNS, 64)
        found["trained on digits, 512"] = _told("trained on digits", 512, trained(), x)
    path = RESULTS / "low_rank.json"
    kept = json.loads(path.read_text())["results"]["layers"] if path.exists() else {}
    results = {"tolerance": TOLERANCE, "columns": COLUMNS, "layers": {**kept, **found}}
    print(keep("low_rank", results))


def _told(name: str, n: int, model: nn.Module, x: Tensor) -> dict[str, Any]:
    load = os.getloadavg()[0]
    found = {"load": load, **case(model, x, ROUNDS.get(n, 21))}
    used = [row["form"] for row in found["table"] if row["why"] == "chosen"]
    gained = found.get("speedup", {}).get("median", 1.0)
    print(f"{name}, {n}: {used}, {gained} x, {found['optimize_seconds']} s", flush=True)
    return found


if __name__ == "__main__":
    main()
