"""Step time, peak memory and saved bytes of ``precision`` against ``torch.autocast``.

Alternating runs in one process; medians of paired ratios with bootstrap intervals. Run
``python -m benchmarks.precision_step [case ...]`` on an otherwise idle machine; the results go to
``benchmarks/results/precision_step_<device>.json``. Peak memory is that of one step above what was
allocated before it: of the allocator on a GPU, of the profiler's record of allocations on a CPU.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import graphopt
from benchmarks.harness import alternate, keep, milliseconds, ratio
from benchmarks.models import ResNet18

Step = Callable[[], object]
ROUNDS = 25


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(1024, 1024), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(1024, 16))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            512, 8, 2048, dropout=0.0, batch_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(512, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).mean(1))
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP of 4 x 1024, batch 256": (mlp, (256, 1024)),
    "encoder of 3 x 512, 8 x 64 tokens": (Encoder, (8, 64, 512)),
    "ResNet-18, 16 x 3 x 64 x 64": (ResNet18, (16, 3, 64, 64)),
}


def step_of(model: nn.Module, x: Tensor, labels: Tensor, autocast: bool) -> Step:
    """Forward, loss and backward from empty gradients."""

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            out = model(x)
            loss = F.cross_entropy(out, labels)
        loss.backward()

    return step


def peak(step: Step) -> int:
    """Bytes that a step allocates at most above what there was."""
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(memory):
        now += size
        most = max(most, now)
    return most


def saved(step: Step) -> int:
    """Bytes that autograd keeps for the backward, parameters not counted; each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def case(make: Callable[[], nn.Module], shape: tuple[int, ...], device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().to(device)
    x = torch.randn(shape, device=device)
    labels = torch.randint(10, shape[:1], device=device)
    spec = "cleanup,precision"
    variants = {
        "float32": (copy.deepcopy(model), False),
        "autocast": (copy.deepcopy(model), True),
        "precision, eager": (
            graphopt.optimize(copy.deepcopy(model), passes=spec, backend="eager"),
            False,
        ),
        "compile, float32": (torch.compile(copy.deepcopy(model)), False),
        "compile, autocast": (torch.compile(copy.deepcopy(model)), True),
        "precision, inductor": (
            graphopt.optimize(copy.deepcopy(model), passes=spec, backend="inductor"),
            False,
        ),
        "all lowered, eager": (
            graphopt.optimize(
                copy.deepcopy(model),
                passes="cleanup,precision{policy=tf,cost=roofline,sums=low}",
                backend="eager",
            ),
            False,
        ),
    }
    steps = {name: step_of(m, x, labels, cast) for name, (m, cast) in variants.items()}
    times = alternate(steps, ROUNDS)
    return {
        "milliseconds": milliseconds(times),
        "eager over autocast (target 1.00)": ratio(times, "precision, eager", "autocast"),
        "eager over float32": ratio(times, "precision, eager", "float32"),
        "inductor over compile with autocast (target 1.00)": ratio(
            times, "precision, inductor", "compile, autocast"
        ),
        "inductor over compile in float32": ratio(times, "precision, inductor", "compile, float32"),
        "peak bytes": {name: peak(step) for name, step in steps.items()},
        "saved bytes": {
            name: saved(steps[name])
            for name in ("float32", "autocast", "precision, eager", "all lowered, eager")
        },
    }


def main(chosen: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    # Times kept by earlier runs would hide what is measured today.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for name, (make, shape) in CASES.items():
            if chosen and not any(c in name for c in chosen):
                continue
            results[name] = case(make, shape, device)
            print(name)
            for key, value in results[name].items():
                print(f"  {key}: {value}", flush=True)
    print("kept in", keep(f"precision_step_{device}", results).name)


if __name__ == "__main__":
    main(sys.argv[1:])
