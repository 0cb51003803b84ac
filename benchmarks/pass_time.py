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


def main() -> None:
    model, tokens = transformer(layers=24)
    capture(model, (tokens,))  # leave torch's own first-time costs out
    rounds = []
    for _ in range(ROUNDS):
        captured = capture(model, (tokens,))
        nodes = len(captured.graph)
        (step,) = Pipeline.parse("cleanup").run(captured.graph)
        rounds.append((captured.seconds, step.seconds, step.verify_seconds))
    seconds, passes, verify = (statistics.median(column) for column in zip(*rounds, strict=True))
    share = statistics.median((p + v) / s for s, p, v in rounds)
    result = {
        "nodes": nodes,
        "nodes after cleanup": step.nodes_after,
        "capture seconds": round(seconds, 3),
        "pass seconds": round(passes, 4),
        "verify seconds": round(verify, 4),
        "pass and verify over capture (target 0.10)": round(share, 4),
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    print("kept in", keep("pass_time", result).name)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
