"""What passes and verification cost besides the capture, on a 24-layer transformer.

Run ``python -m benchmarks.pass_time``; the result goes to ``benchmarks/results/pass_time.json``.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.harness import keep
from benchmarks.models import transformer
from graphopt.capture import capture
from graphopt.pipeline import Pipeline

ROUNDS = 5
SHARE = "pass and verify over capture (target 0.10)"


def measure(rounds: int) -> dict[str, float]:
    """Medians of so many captures, each with its passes and its verification."""
    model, tokens = transformer(layers=24)
    capture(model, (tokens,))  # leave torch's own first-time costs out
    taken = []
    for _ in range(rounds):
        captured = capture(model, (tokens,))
        nodes = len(captured.graph)
        (step,) = Pipeline.parse("cleanup").run(captured.graph)
        taken.append((captured.seconds, step.seconds, step.verify_seconds))
    seconds, passes, verify = (statistics.median(column) for column in zip(*taken, strict=True))
    share = statistics.median((p + v) / s for s, p, v in taken)
    return {
        "nodes": nodes,
        "nodes after cleanup": step.nodes_after,
        "capture seconds": round(seconds, 3),
        "pass seconds": round(passes, 4),
        "verify seconds": round(verify, 4),
        SHARE: round(share, 4),
    }


def main() -> None:
    """Measure, print and keep."""
    torch.manual_seed(0)
    result = measure(ROUNDS)
    for key, value in result.items():
        print(f"{key}: {value}")
    print("kept in", keep("pass_time", result).name)


if __name__ == "__main__":
    main()
