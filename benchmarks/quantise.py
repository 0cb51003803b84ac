"""Quantising to flex tensors: speed against a copy and other simulators, and what they misround.

Alternating runs in one process; medians of paired ratios with bootstrap intervals. Run
``python -m benchmarks.quantise`` on an otherwise idle machine. Peers (QPyTorch, microxcaling,
torchao) are measured where they can be imported; those that cannot are listed with the reason. With
a GPU the kernels run there, and `int16_mm` is compared with TF32. Results go to
``benchmarks/results/quantise_<device>.json``, with the load of the machine when it began.

Targets: faster than every peer, and at least half of the bandwidth of a copy of the same bytes.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)
from benchmarks.harness import Run, alternate, keep, milliseconds, ratio
from benchmarks.quantise_misrounds import misrounds
from benchmarks.quantise_peers import PEERS
from graphopt.ops import flex
from graphopt.runtime import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Elements, and rounds of alternating runs with copies and, as some are slow, with peers.
SIZES = {2**20: (201, 21), 2**24: (31, 5)}
if DEVICE == "cuda":
    SIZES = {2**20: (201, 101), 2**24: (101, 51), 2**28: (51, 11)}
THREADS = (1, 2) if DEVICE == "cpu" else (torch.get_num_threads(),)
# An element is read as float32 and written as int16.
BYTES = 6
MINE = "graphopt"
COPY, REUSED = "copy, new memory", "copy, memory reused"


def own(count: int) -> dict[str, Run]:
    """The operators on `count` normal numbers, and copies of as many bytes."""
    x = torch.randn(count, device=DEVICE)
    known, unknown = (
        torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in (-12, flex.UNKNOWN)
    )
    seed = torch.tensor([1, 2], device=DEVICE)
    mantissas, _ = torch.ops.graphopt.flex_quantise(x, known, 16)
    same_bytes = torch.zeros(count * BYTES // 4, dtype=torch.int16, device=DEVICE)
    reused = torch.empty_like(same_bytes)
    return {
        MINE: lambda: torch.ops.graphopt.flex_quantise(x, known, 16),
        "graphopt, exponent unknown": lambda: torch.ops.graphopt.flex_quantise(x, unknown, 16),
        "graphopt, stochastic": lambda: torch.ops.graphopt.flex_quantise(x, known, 16, 0, seed),
        "graphopt, flex_round": lambda: torch.ops.graphopt.flex_round(x, known, 16),
        "graphopt, flex_dequantise": lambda: torch.ops.graphopt.flex_dequantise(mantissas, known),
        COPY: same_bytes.clone,
        REUSED: lambda: reused.copy_(same_bytes),
    }


def peers(count: int) -> tuple[dict[str, Run], dict[str, str]]:
    """What is compared with on `count` normal numbers, and why some of it is not."""
    x = torch.randn(count, device=DEVICE)
    known = torch.tensor(-12, dtype=torch.int32, device=DEVICE)
    runs: dict[str, Run] = {
        MINE: lambda: torch.ops.graphopt.flex_quantise(x, known, 16),
        "graphopt, reference": lambda: flex.flex_quantise(x, known, 16),
    }
    missing: dict[str, str] = {}
    for name, prepare in PEERS.items():
        try:
            run = prepare(x)
            run()
        except Exception as error:  # Whatever a peer that is not installed, or fails, raises.
            missing[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        else:
            runs[name] = run
    return runs, missing


def figures(times: dict[str, list[float]], count: int) -> dict[str, Any]:
    """Medians and the fastest run: on a busy machine the latter is what the code can do."""
    return {
        "milliseconds": milliseconds(times),
        "fastest milliseconds": {name: round(1e3 * min(t), 3) for name, t in times.items()},
        "GB/s of 6 bytes per element": {
            name: round(BYTES * count / statistics.median(values) / 1e9, 2)
            for name, values in times.items()
        },
        "time over graphopt's": {name: ratio(times, name, MINE) for name in times if name != MINE},
        "fastest over graphopt's": {
            name: round(min(values) / min(times[MINE]), 3) for name, values in times.items()
        },
    }


def speed(count: int, rounds: int, rounds_of_peers: int) -> dict[str, Any]:
    times = alternate(own(count), rounds)
    runs, missing = peers(count)
    return {
        "own": figures(times, count),
        "graphopt's time over a copy's": {
            name: ratio(times, MINE, name) for name in (COPY, REUSED)
        },
        "peers": figures(alternate(runs, rounds_of_peers, warmup=1), count),
        "not measured": missing,
    }


def products(side: int = 4096, rounds: int = 31) -> dict[str, Any]:
    """Exact int16 products against TF32, of square matrices."""
    a, b = (
        torch.randint(-32768, 32768, (side, side), dtype=torch.int16, device=DEVICE)
        for _ in range(2)
    )
    x, y = a.float(), b.float()
    torch.backends.cuda.matmul.allow_tf32 = True
    runs: dict[str, Run] = {
        "int16_mm": lambda: torch.ops.graphopt.int16_mm(a, b),
        "TF32": lambda: x @ y,
        "float64": lambda: a.double() @ b.double(),
    }
    exact = torch.equal(torch.ops.graphopt.int16_mm(a, b), (a.double() @ b.double()).long())
    times = alternate(runs, rounds)
    teraflops: Callable[[str], float] = lambda name: (  # noqa: E731
        2 * side**3 / statistics.median(times[name]) / 1e12
    )
    return {
        "side": side,
        "equal to float64": exact,
        "TFLOPS": {name: round(teraflops(name), 2) for name in runs},
        "int16_mm / TF32": ratio(times, "int16_mm", "TF32"),
    }


def check(x: Tensor) -> None:
    """The kernels measured here give the bits of the reference."""
    e = torch.tensor(-12, dtype=torch.int32, device=DEVICE)
    for found, wanted in zip(
        torch.ops.graphopt.flex_quantise(x, e, 16), flex.flex_quantise(x, e, 16), strict=True
    ):
        assert torch.equal(found, wanted)


def main() -> None:
    kernels.register_flex()
    check(torch.randn(2**18, device=DEVICE))
    results: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    for threads in THREADS:
        torch.set_num_threads(threads)
        for count, (rounds, rounds_of_peers) in SIZES.items():
            name = f"{count >> 20} Mi elements, {threads} threads"
            results[name] = speed(count, rounds, rounds_of_peers)
            print(name, results[name], flush=True)
    results["misrounded"] = misrounds(DEVICE)
    print(results["misrounded"])
    if DEVICE == "cuda":
        results["int16_mm"] = products()
        print(results["int16_mm"])
    results["load at the end"] = round(os.getloadavg()[0], 2)
    print(keep(f"quantise_{DEVICE}", results))


if __name__ == "__main__":
    main()
