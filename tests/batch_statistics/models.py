"""Models with batch norms, and what their norms should evaluate with, by torch alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import graphopt
from graphopt.model.surface import restore

SPEC = "cleanup,batch_statistics"


class Net(nn.Module):
    """An image norm, a norm that averages over all batches, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.image = nn.BatchNorm2d(4, momentum=0.3)
        self.head = nn.Linear(4, 5)
        self.cumulative = nn.BatchNorm1d(5, momentum=None, eps=1e-3)
        self.twice = nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(self.conv(x)).relu().mean((2, 3))
        x = self.twice(self.cumulative(self.head(x)))
        result: Tensor = self.twice(3 * x.exp())
        return result


def net() -> Net:
    """The same at every call, in double precision."""
    torch.manual_seed(1)
    return Net().double()


def small() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Layers and an example batch, for `check_runtime`."""
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)]
    return nn.Sequential(*layers).double(), (torch.randn(8, 4, dtype=torch.float64),)


def batch(seed: int, size: int = 6) -> Tensor:
    """Images whose mean and spread differ from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x * (1 + seed % 3) + seed % 5


def optimized(model: nn.Module, spec: str = SPEC, **options: Any) -> Any:
    """The model, with the pass."""
    return graphopt.optimize(model, passes=spec, backend="eager", **options)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of all tests."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
    """One step on some micro-batches."""
    optimizer.zero_grad()
    for x in batches:
        ends = x is batches[-1] or not hasattr(model, "no_sync")
        with nullcontext() if ends else model.no_sync():
            (model(x).square().mean() / len(batches)).backward()
    optimizer.step()


def seen(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What each norm of the model sees of some batches, by its name; the model stays as it is."""
    plain = copy.deepcopy(model)
    restore(plain)
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _, args: found.setdefault(name, []).append(args[0].detach())

    for name, module in plain.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(hook(name))
    for x in batches:
        plain(x)
    return found


def check(model: nn.Module, steps: Sequence[dict[str, list[Tensor]]], rtol: float = 1e-9) -> None:
    """Each norm has the statistics of all that it has seen in these steps."""
    for name in steps[0]:
        everything = torch.cat([x.transpose(0, 1).flatten(1) for s in steps for x in s[name]], 1)
        var, mean = torch.var_mean(everything.double(), 1)
        norm = model.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        scale = (var + norm.eps).sqrt()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert ((norm.running_mean - mean).abs() <= rtol * (scale + mean.abs())).all(), name
        assert ((norm.running_var - var).abs() <= rtol * (var + norm.eps)).all(), name
