"""Time and memory of a whole training step with `kfac`, over plain SGD and against other libraries.

Run ``python -m benchmarks.kfac_step [case ...]`` on an otherwise idle machine; the results go to
``benchmarks/results/kfac_step_<device>.json``. Libraries that are not installed are left out.

Every round runs each variant once, in random order. With interval 10 a run is ten steps, one of
which renews statistics and inverses; with interval 1 it is a single step. "Stale step" is one that
renews nothing. With ``interval=stale`` the rule of SP-NGD has had `settling` steps on one batch, so
that its intervals have grown. Overheads are ``(t - t_sgd) / t_sgd`` with the SGD step of the same
round; figures are medians with 95 % bootstrap intervals.

The other libraries do less: kfac-pytorch leaves norms and embeddings alone, ASDL embeddings. No
method with dense inverses has less of a stale step than the two products of ``G⁻¹ M A⁻¹``; their
multiplications over those of forward and backward are reported: a layer with N rows of data has
(rows + columns) / (3 N) of them, whatever the library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import alternate, keep, milliseconds, ratio
from benchmarks.kfac_step_variants import (
    Step,
    Task,
    gpt,
    kfac_spec,
    mlp,
    optimized,
    peers,
    pytorch,
    resnet,
)
from graphopt.model.controller import controller_of

INTERVAL = 10
# Long enough that no step of a measurement renews anything but the first.
NEVER = 10**6
Times = dict[str, list[float]]
Figures = dict[str, dict[str, float]]
Result = dict[str, object]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        rounds: of alternating runs.
        settling: steps before the interval rule is measured.
        inductor: whether the compiled form is measured, too.
    """

    rounds: int = 9
    settling: int = 60
    inductor: bool = True


def measure(task: Task, size: Size) -> Result:
    """Times, overheads and memory of one model."""
    torch._dynamo.reset()
    long: dict[str, Step] = {"sgd": pytorch(task)}
    long["graphopt without kfac"] = optimized(task, "cleanup")[0]
    short: dict[str, Step] = {}
    short["kfac, interval 1"] = optimized(task, kfac_spec(1))[0]
    long["kfac, interval 10"] = optimized(task, kfac_spec(INTERVAL))[0]
    long["kfac, stale step"] = optimized(task, kfac_spec(NEVER))[0]
    if size.inductor:
        long["kfac inductor, interval 10"] = optimized(task, kfac_spec(INTERVAL), "inductor")[0]
    settled, model = optimized(task, kfac_spec("stale"))
    for _ in range(size.settling):
        settled()
    long["kfac, interval stale"] = settled
    short |= peers(task, 1)
    long |= peers(task, INTERVAL)
    times = _per_step(long, short, size.rounds)
    return {
        "milliseconds": milliseconds(times),
        "overhead": {name: _minus_one(ratio(times, name, "sgd")) for name in times},
        "stale intervals": _intervals(model),
        "overhead over the best peer's (target 0.7)": _against_peers(times),
        "step over SGD's (target 1.10)": {
            name: ratio(times, name, "sgd")
            for name in ("kfac, stale step", "kfac, interval 10", "kfac, interval stale")
        },
        "multiplications of a stale step over SGD's": 1 + round(_products(task, model), 3),
        "memory": memory(task),
    }


def _per_step(long: Mapping[str, Step], short: Mapping[str, Step], rounds: int) -> Times:
    """Seconds of a step; runs of several steps are divided by their number."""

    def several(step: Step) -> Step:
        def run() -> None:
            for _ in range(INTERVAL):
                step()

        return run

    runs = {**{name: several(step) for name, step in long.items()}, **short}
    times = alternate(runs, rounds, warmup=1)
    return {n: [t / INTERVAL for t in ts] if n in long else ts for n, ts in times.items()}


def _against_peers(times: Times) -> dict[str, object]:
    """Overhead of `kfac` divided by that of the library that has the least, by interval."""
    found: dict[str, object] = {}
    for own in ("kfac, interval 1", "kfac, interval 10"):
        interval = own.removeprefix("kfac")
        extra = {
            name: [t - s for t, s in zip(ts, times["sgd"], strict=True)]
            for name, ts in times.items()
            if name == own or (name.endswith(interval) and not name.startswith("kfac "))
        }
        others = [name for name in extra if name != own]
        if others:
            best = min(others, key=lambda name: sorted(extra[name])[len(extra[name]) // 2])
            found[own] = {"best peer": best, **ratio(extra, own, best)}
    return found


def _minus_one(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(value - 1, 4) for key, value in figures.items()}


def _products(task: Task, model: nn.Module) -> float:
    """Multiplications of ``G⁻¹ M A⁻¹`` for all weights over those of forward and backward."""
    step = pytorch(task)
    with FlopCounterMode(display=False) as counter:
        step()
    sizes: dict[str, dict[str, torch.Size]] = {}
    for key, value in _state(model).items():
        block, _, name = key.rpartition("/")
        if name in ("left_inverse", "right_inverse"):
            sizes.setdefault(block, {})[name] = value.shape
    total = 0
    for pair in sizes.values():
        left, right = pair["left_inverse"], pair["right_inverse"]
        # A diagonal [B, d] multiplies each number once, [B, d, d] each d times.
        total += 2 * left.numel() * right[1] + 2 * right.numel() * left[1]
    return total / counter.get_total_flops()


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    controller = controller_of(model)
    assert controller is not None
    return controller.session.state("kfac")


def _intervals(model: nn.Module) -> dict[str, float]:
    """Steps between the last two refreshes, over all statistics."""
    last = [int(v[0]) for k, v in _state(model).items() if k.startswith("interval/")]
    return {"mean": sum(last) / len(last), "least": min(last)}


# -- memory ----------------------------------------------------------------------------------------


def memory(task: Task) -> dict[str, int]:
    """Bytes saved for the backward, and the peak of a step above what exists before it."""
    variants = {
        "sgd": pytorch(task),
        "graphopt without kfac": optimized(task, "cleanup")[0],
        "kfac, refresh step": optimized(task, kfac_spec(1))[0],
        "kfac, stale step": optimized(task, kfac_spec(NEVER))[0],
    }
    found: dict[str, int] = {}
    for name, step in variants.items():
        for _ in range(2):
            step()
        found[f"saved for backward, {name}"] = saved_bytes(step)
        found[f"peak, {name}"] = peak_bytes(step)
    return found


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps from the forward to the backward; each memory counts once."""
    seen: dict[int, int] = {}
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        # Alive until all are counted, so that no address is used again.
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(seen.values())


def peak_bytes(step: Step) -> int:
    """Most bytes allocated at once in a step, above what was allocated before."""
    device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *device], profile_memory=True) as trace:
        step()
    results = trace.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


CASES: dict[str, Callable[[], Task]] = {
    "MLP 784-256-256-10, batch 512": lambda: mlp(512),
    "MLP 784-256-256-10, batch 4096": lambda: mlp(4096),
    "ResNet-8 of width 16, batch 64": lambda: resnet(64),
    "GPT of 2 layers, width 128, 16x64 tokens": lambda: gpt(16),
    "GPT of 2 layers, width 128, 64x64 tokens": lambda: gpt(64),
}


def main(chosen: list[str], size: Size) -> dict[str, Result]:
    """Measures the cases whose names contain one of the words, or all; prints and returns it."""
    results: dict[str, Result] = {}
    for name, make in CASES.items():
        if chosen and not any(word in name for word in chosen):
            continue
        print(name, flush=True)
        results[name] = measure(make(), size)
        for key, value in results[name].items():
            print(f"  {key}:", *(() if isinstance(value, dict) else (value,)), flush=True)
            for line, figures in value.items() if isinstance(value, dict) else ():
                print(f"    {line}: {figures}", flush=True)
    return results


if __name__ == "__main__":
    words = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = main(words, Size())
    if not words:
        print("kept in", keep(f"kfac_step_{device}", results).name)
