"""Training step and inference time against PyTorch eager and `torch.compile`.

Alternating runs in one process; medians of paired ratios with bootstrap intervals. Run
``python -m benchmarks.step_time [case ...]`` on an otherwise idle machine; the results go to
``benchmarks/results/step_time_<device>.json``.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from benchmarks.harness import alternate, keep, milliseconds, ratio
from benchmarks.models import ResNet18, digits_resnet, tiny_gpt2

Step = Callable[[], object]


def training_step(
    model: nn.Module, inputs: tuple[Tensor, ...], loss: Callable[..., Tensor]
) -> Step:
    """Forward and backward from empty gradients; no optimizer, which is the same for all."""

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        loss(model(*inputs)).backward()

    return step


def training(
    name: str,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loss: Callable[..., Tensor],
    rounds: int,
) -> dict[str, object]:
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    variants = {
        "pytorch": plain,
        "compile": torch.compile(copy.deepcopy(model)),
        # The same random stream as eager's, which graphopt always gives.
        "compile fallback_random": torch.compile(
            copy.deepcopy(model), options={"fallback_random": True}
        ),
        "graphopt eager": graphopt.optimize(copy.deepcopy(model), backend="eager"),
        "graphopt inductor": graphopt.optimize(copy.deepcopy(model), backend="inductor"),
        "graphopt auto": graphopt.optimize(copy.deepcopy(model), backend="auto"),
    }
    steps = {n: training_step(m, inputs, loss) for n, m in variants.items()}
    times = alternate(steps, rounds)
    best = min(("pytorch", "compile"), key=lambda peer: statistics.median(times[peer]))
    result = {
        "milliseconds": milliseconds(times),
        "eager over pytorch (target 1.10)": ratio(times, "graphopt eager", "pytorch"),
        "inductor over compile (target 1.05)": ratio(times, "graphopt inductor", "compile"),
        "inductor over compile with fallback_random": ratio(
            times, "graphopt inductor", "compile fallback_random"
        ),
        f"auto over the better, {best} (target 1.03)": ratio(times, "graphopt auto", best),
    }
    _show(name, result)
    return result


def inference(name: str, model: nn.Module, x: Tensor, rounds: int) -> dict[str, object]:
    torch._dynamo.reset()
    model.eval()
    folded = "cleanup,fold_inference"
    variants = {
        "pytorch": copy.deepcopy(model),
        "compile": torch.compile(copy.deepcopy(model)),
        "graphopt folded eager": graphopt.optimize(
            copy.deepcopy(model), passes=folded, backend="eager"
        ),
        "graphopt folded inductor": graphopt.optimize(
            copy.deepcopy(model), passes=folded, backend="inductor"
        ),
    }
    with torch.no_grad():
        times = alternate({n: (lambda m=m: m(x)) for n, m in variants.items()}, rounds)
    result = {
        "milliseconds": milliseconds(times),
        "folded inductor over compile (target 0.90)": ratio(
            times, "graphopt folded inductor", "compile"
        ),
        "folded eager over pytorch": ratio(times, "graphopt folded eager", "pytorch"),
    }
    _show(name, result)
    return result


def _show(name: str, result: dict[str, object]) -> None:
    print(name, flush=True)
    for key, value in result.items():
        print(f"  {key}: {value}", flush=True)


def main(chosen: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8, device=device)
    labels = torch.randint(10, (64,), device=device)
    tokens = torch.randint(512, (8, 64), device=device)
    cases: dict[str, Callable[[], dict[str, object]]] = {
        "training digits ResNet, batch 64": lambda: training(
            "digits ResNet",
            digits_resnet().to(device),
            (images,),
            lambda out: F.cross_entropy(out, labels),
            60,
        ),
        "training tiny GPT-2, 8x64 tokens": lambda: training(
            "tiny GPT-2",
            tiny_gpt2().to(device),
            (tokens,),
            lambda out: F.cross_entropy(out.logits.flatten(0, 1), tokens.flatten()),
            60,
        ),
        "inference ResNet-18, 4x3x224x224": lambda: inference(
            "ResNet-18", ResNet18().to(device), torch.randn(4, 3, 224, 224, device=device), 40
        ),
    }
    # Cached choices of earlier runs would hide what "auto" decides today.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        results = {
            name: run()
            for name, run in cases.items()
            if not chosen or any(c in name for c in chosen)
        }
    print("kept in", keep(f"step_time_{device}", results).name)


if __name__ == "__main__":
    main(sys.argv[1:])
