"""Models of the corpus that each use one form of Python or PyTorch that is easy to break."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def used_twice() -> Made:
    """One module called twice, and a second name for one of its parts."""
    return _UsedTwice(), (torch.randn(3, 6),), {}


def checkpointed() -> Made:
    """Two blocks with dropout that are computed again in backward."""
    return _Checkpointed(), (torch.randn(3, 8),), {}


def in_place() -> Made:
    """Operators that write into their argument, and assignments to parts of a tensor."""
    return _InPlace(), (torch.randn(3, 6),), {}


def dict_output() -> Made:
    """Two heads, returned by name."""
    return _TwoHeads(), (torch.randn(3, 6),), {}


def dataclass_output() -> Made:
    """Two heads, returned in a dataclass."""
    return _WithDataclass(), (torch.randn(3, 6),), {}


def keyword_input() -> Made:
    """Tensors and a plain number by keyword, one of them left out."""
    x, scale = torch.randn(3, 6), torch.rand(6)
    return _WithKeywords(), (), {"x": x, "scale": scale, "power": 2}


def custom_function() -> Made:
    """A differentiable function whose backward is written by hand, and not the true one."""
    return _WithFunction(), (torch.randn(3, 6),), {}


def branching() -> Made:
    """Control flow that depends on data."""
    return _Branching(), (torch.randn(3, 6),), {}


def parametrised() -> Made:
    """Weights computed from parameters: by length and direction, and by spectral norm."""
    layers = [
        parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.Tanh(),
        nn.Linear(8, 2),
    ]
    return nn.Sequential(*layers), (torch.randn(3, 6),), {}


def autocast() -> Made:
    """A region in bfloat16 between layers in float32."""
    return _WithAutocast(), (torch.randn(3, 6),), {}


def running_statistics() -> Made:
    """Buffers that the forward pass renews by hand, one of them a whole number."""
    return _RunningStatistics(), (torch.randn(3, 6),), {}


def partly_frozen() -> Made:
    """A frozen layer, a layer that nothing uses, and an input that wants a gradient."""
    return _PartlyFrozen(), (torch.randn(3, 6, requires_grad=True),), {}


# -- parts -----------------------------------------------------------------------------------------


class _UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.alias = self.block[0]
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block(x))
        x = self.norm(self.block(x))
        result: Tensor = self.alias(x)
        return result


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5)) for _ in range(2)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        logits: Tensor = self.head(x)
        return logits


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu_()
        y = y.clone()
        y[:, 0] = 0.0
        y[:, 1:3].mul_(2.0)
        y += x
        z = torch.zeros_like(y)
        z[0] = y.sum(0)
        z.index_add_(0, torch.tensor([1, 2], device=x.device), y[:2])
        result: Tensor = self.second(z).add_(1.0).sigmoid_()
        return result


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.left = nn.Linear(8, 2)
        self.right = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.elu(self.body(x))
        return {"right": self.right(x), "left": self.left(x)}


@dataclass
class HeadsOutput:
    """What the model of `dataclass_output` returns."""

    left: Tensor
    right: Tensor


class _WithDataclass(_TwoHeads):
    def forward(self, x: Tensor) -> HeadsOutput:  # type: ignore[override]
        return HeadsOutput(**super().forward(x))


class _WithKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(
        self, x: Tensor, *, scale: Tensor, shift: Tensor | None = None, power: int = 1
    ) -> Tensor:
        x = (x * scale) ** power
        y: Tensor = self.layer(x if shift is None else x + shift)
        return y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return torch.sign(x) * slope

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        return gradient * slope * (x.abs() < 1), (gradient * torch.sign(x)).sum(0)


class _WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.slope = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = _StraightThrough.apply(self.layer(x), self.slope)  # type: ignore[no-untyped-call]
        y: Tensor = self.head(x)
        return y


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x = torch.cond(x.sum() > 0, torch.sin, lambda v: torch.cos(v) * 2.0, (x,))
        y: Tensor = self.head(x)
        return y


class _WithAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            x = self.second(self.norm(F.relu(self.first(x))))
        y: Tensor = self.head(x.float())
        return y


class _RunningStatistics(nn.Module):
    average: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.training:
            with torch.no_grad():
                self.count.add_(1)
                self.average.lerp_(y.mean(0), 1.0 / (self.count + 1.0))
        return y - self.average


class _PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 6, bias=False)
        self.trained = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.trained(torch.tanh(self.frozen(x)))
        return y
