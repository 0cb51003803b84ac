"""The first step of a model in a new process: cold, and warm from what an earlier one has kept.

    python -m benchmarks.first_call eager
    python -m benchmarks.first_call inductor

Each measurement is a process of its own with a cache folder of its own; the warm one is a second
process with that folder. The time is that of the first call and its backward, from the model as it
was built: capture, passes, verification and backend. Seconds of the wall, and of the processor,
which says more where the machine is not idle. Peers: `torch.compile` with ``aot_eager``, which has
no code generator, and with Inductor, cold and with its caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import keep

VARIANTS = {
    "eager": ("graphopt eager", "torch.compile aot_eager"),
    "inductor": ("graphopt inductor", "torch.compile inductor"),
}


class Block(nn.Module):
    """Of a ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and a short cut."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class Dense(nn.Module):
    """A layer of a DenseNet."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """All earlier channels, and new ones."""
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


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


def resnet18() -> tuple[nn.Module, Tensor]:
    """20 convolutions, an eighth of the width."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    inputs = 8
    for outputs in (8, 16, 32, 64):
        for stride in (1 if outputs == 8 else 2, 1):
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*layers, *tail), torch.randn(2, 3, 32, 32)


def densenet121() -> tuple[nn.Module, Tensor]:
    """120 convolutions, an eighth of the width."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1, bias=False)]
    width = 8
    for count in (6, 12, 24, 16):
        for _ in range(count):
            layers.append(Dense(width, 4))
            width += 4
        halved = nn.Conv2d(width, width // 2, 1, bias=False)
        layers += [nn.BatchNorm2d(width), nn.ReLU(), halved, nn.AvgPool2d(2)]
        width //= 2
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(*layers, *tail), torch.randn(2, 3, 32, 32)


def vit() -> tuple[nn.Module, Tensor]:
    """12 blocks of a vision transformer."""
    patches = (nn.Conv2d(3, 64, 8, 8), nn.Flatten(2), Swapped())
    blocks = (Attention(64, causal=False) for _ in range(12))
    return nn.Sequential(*patches, *blocks, nn.Linear(64, 10)), torch.randn(2, 3, 32, 32)


def transformer24() -> tuple[nn.Module, Tensor]:
    """24 blocks of a language model."""
    blocks = (Attention(64, causal=True) for _ in range(24))
    net = nn.Sequential(nn.Embedding(100, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 100))
    return net, torch.randint(0, 100, (2, 32))


class Swapped(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """Swap the last two dimensions."""
        return x.transpose(1, 2)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet18": resnet18,
    "densenet121": densenet121,
    "vit": vit,
    "transformer24": transformer24,
}


def first_step(model: str, variant: str) -> dict[str, float]:
    """Seconds of the first step in this process."""
    import graphopt

    torch.manual_seed(0)
    net, x = MODELS[model]()
    net(x).float().square().mean().backward()  # kernels of the library are ready
    net.zero_grad()
    run: Callable[[Tensor], Tensor] = net
    if variant.startswith("graphopt"):
        graphopt.optimize(net, backend=variant.split()[1])
    else:
        run = torch.compile(net, backend=variant.split()[1])
    wall, processor = time.perf_counter(), time.process_time()
    run(x).float().square().mean().backward()
    return {
        "wall": round(time.perf_counter() - wall, 3),
        "processor": round(time.process_time() - processor, 3),
    }


def measured(model: str, variant: str) -> dict[str, dict[str, float]]:
    """Cold and warm, in two processes with one new cache folder."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        own = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        for state in ("cold", "warm"):
            child = [sys.executable, "-m", "benchmarks.first_call", model, variant]
            run = subprocess.run(
                child, env={**os.environ, **own}, capture_output=True, text=True, check=True
            )
            found[state] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(backend: str) -> None:
    """Measure all models and keep the result."""
    results: dict[str, object] = {}
    for model in MODELS:
        times = {variant: measured(model, variant) for variant in VARIANTS[backend]}
        shares = {
            name: round(t["warm"]["processor"] / t["cold"]["processor"], 3)
            for name, t in times.items()
        }
        results[model] = {"seconds": times, "warm over cold, processor": shares}
        print(model, json.dumps(results[model]), flush=True)
    keep(f"first_call_{backend}", {"threads": torch.get_num_threads(), "models": results})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(first_step(*sys.argv[1:])))
    else:
        main(sys.argv[1])
