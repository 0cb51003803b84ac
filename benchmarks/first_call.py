"""The first step of a model in a new process: cold, and warm from what an earlier one has kept.

    python -m benchmarks.first_call eager [MODEL ...]
    python -m benchmarks.first_call inductor [MODEL ...]
    python -m benchmarks.first_call cold CHECKOUT [MODEL ...]

Each measurement is a process of its own; those of one variant share a new cache folder, so that the
first is cold and the others are warm. The time is that of the first call and its backward, from the
model as it was built: capture, passes, verification, backend and the step itself. Seconds of the
wall, and of the processor, which says more where the machine is not idle. Peers: `torch.compile`
with ``aot_eager``, which has no code generator, and with Inductor, cold and with its caches.

``cold`` compares cold first calls of this checkout with those of another one, of an earlier commit,
and with ``aot_eager``: seconds of the processor, the three in turn, each in a process and a folder
of its own.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, keep
from benchmarks.inference_models import make

VARIANTS = {
    "eager": ("graphopt eager", "torch.compile aot_eager"),
    "inductor": ("graphopt inductor", "torch.compile inductor"),
}
OWN = "transformer24"
MODELS = (
    *("resnet18", "mobilenet_v3", "densenet121", "convnext", "unet", "swin", "gpt2"), OWN,
)  # fmt: skip
CLOCKS = ("wall", "processor")


class Attention(nn.Module):
    """A block of a transformer, with dropout."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then a perceptron."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


def transformer24() -> tuple[nn.Module, Tensor]:
    """24 blocks of a language model."""
    blocks = (Attention(64, causal=True) for _ in range(24))
    net = nn.Sequential(nn.Embedding(100, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 100))
    return net, torch.randint(0, 100, (2, 32))


def first_step(name: str, variant: str) -> dict[str, object]:
    """Seconds of the first step in this process, and of another one."""
    import graphopt
    from graphopt.model.surface import report

    torch.manual_seed(0)
    net, x = transformer24() if name == OWN else make(name, batch=1)
    net.train()
    net(x).float().square().mean().backward()  # kernels of the library are ready
    net.zero_grad()
    run: Callable[[Tensor], Tensor] = net
    if variant.startswith("graphopt"):
        graphopt.optimize(net, backend=variant.split()[1])
    else:
        run = torch.compile(net, backend=variant.split()[1])
    seconds = []
    for _ in range(2):
        wall, processor = time.perf_counter(), _processor()
        run(x).float().square().mean().backward()
        seconds.append({
            "wall": round(time.perf_counter() - wall, 3),
            "processor": round(_processor() - processor, 3),
        })  # fmt: skip
    said = {}
    if run is net:
        made = report(net).specialisations[-1]
        said = {"route": made.route, "unkept": made.unkept, "backend": made.backend.backend}
    return {"first": seconds[0], "second": seconds[1], **said}


def _processor() -> float:
    """Of this process and of the compilers that it has started and seen end."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, children))


def measured(name: str, variants: Sequence[str], warm: int = 3) -> dict[str, dict[str, Any]]:
    """Cold once and warm some times, each in a process; the variants take turns."""
    found: dict[str, dict[str, Any]] = {v: {"cold": None, "warm": []} for v in variants}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(1 + warm):
            order = list(variants)
            random.Random(turn).shuffle(order)
            for variant in order:
                one = _process(name, variant, f"{folder}/{variant.replace(' ', '_')}")
                if turn == 0:
                    found[variant]["cold"] = one
                else:
                    found[variant]["warm"].append(one)
    return found


def _process(name: str, variant: str, folder: str, checkout: str = "") -> Any:
    own = {
        "XDG_CACHE_HOME": folder,
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # so that its compilers are children of the process
    }
    child = [sys.executable, "-m", "benchmarks.first_call", name, "--as", variant]
    run = subprocess.run(
        child,
        env={**os.environ, **own, **({"PYTHONPATH": checkout} if checkout else {})},
        cwd=checkout or None,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def cold(checkout: str, name: str, rounds: int) -> dict[str, Any]:
    """Cold first calls of a model: here, in another checkout, and of the peer, in turn."""
    ours, peer = VARIANTS["eager"]
    here = os.getcwd()
    variants = {"before": (checkout, ours), "after": (here, ours), "aot_eager": (here, peer)}
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds):
        order = list(variants)
        random.Random(turn).shuffle(order)
        for variant in order:
            place, what = variants[variant]
            with tempfile.TemporaryDirectory() as folder:
                one = _process(name, what, folder, place)
            found[variant].append(one["first"]["processor"])
    median = {variant: statistics.median(seconds) for variant, seconds in found.items()}
    pairs = zip(found["after"], found["before"], strict=True)
    return {
        "processor seconds": found,
        "after over before": round(statistics.median(a / b for a, b in pairs), 3),
        "before over aot_eager": round(median["before"] / median["aot_eager"], 3),
        "after over aot_eager": round(median["after"] / median["aot_eager"], 3),
    }


def share(one: Mapping[str, Any], clock: str) -> float:
    """The median warm call as a share of the cold one."""
    warm = statistics.median(run["first"][clock] for run in one["warm"])
    return round(warm / one["cold"]["first"][clock], 3)


def kept(times: Any, variants: Sequence[str], *, quiet: bool) -> dict[str, Any]:
    """What is kept of a model; the wall says nothing where others have the machine, too."""
    clocks = CLOCKS if quiet else CLOCKS[1:]
    for one in times.values():
        for run in (one["cold"], *one["warm"]):
            for step in ("first", "second"):
                run[step] = {clock: run[step][clock] for clock in clocks}
    ours, peer = (times[variant]["cold"]["first"] for variant in variants)
    return {
        "threads": torch.get_num_threads(),
        "quiet": quiet,
        "warm over cold": {
            variant: {clock: share(one, clock) for clock in clocks}
            for variant, one in times.items()
        },
        "cold over the peer's cold": {
            clock: round(ours[clock] / peer[clock], 3) for clock in clocks
        },
        "runs": times,
    }


def main(backend: str, names: Sequence[str]) -> None:
    """Measure some models; results of others that are there stay."""
    file = RESULTS / "first_call.json"
    results: dict[str, Any] = json.loads(file.read_text())["results"] if file.exists() else {}
    for name in names:
        times = measured(name, VARIANTS[backend])
        entry = kept(times, VARIANTS[backend], quiet=os.nice(0) == 0)
        results.setdefault(backend, {})[name] = entry
        shown = {key: value for key, value in entry.items() if key != "runs"}
        print(backend, name, json.dumps(shown), flush=True)
        keep("first_call", results)


def main_cold(checkout: str, names: Sequence[str]) -> None:
    """Measure some models; results of others that are there stay."""
    file = RESULTS / "first_call_cold.json"
    results: dict[str, Any] = json.loads(file.read_text())["results"] if file.exists() else {}
    for name in names:
        results[name] = cold(checkout, name, rounds=2) | {"threads": torch.get_num_threads()}
        print(name, json.dumps(results[name]), flush=True)
        keep("first_call_cold", results)


if __name__ == "__main__":
    if sys.argv[1] == "cold":
        main_cold(sys.argv[2], sys.argv[3:] or ("resnet18", "mobilenet_v3", OWN))
    elif "--as" in sys.argv:
        print(json.dumps(first_step(sys.argv[1], sys.argv[3])))
    else:
        main(sys.argv[1], sys.argv[2:] or MODELS)
