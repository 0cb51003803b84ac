"""Habits of modules that keep something from call to call; see `layers` for their shape."""

from __future__ import annotations

import collections
import random

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.testing.fuzz.layers import WIDTH


class Counter(nn.Module):
    """A Python number that enters the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        self.calls += 1
        return h / (1 + 0.1 * self.calls)


class CountsOnly(nn.Module):
    """Numbers that do not: a counter in train mode, and one in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.own = 0, Meter()

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        self.own.seen += len(h)
        if self.training:
            self.calls += 1
            self.own.trained = True
        return h + 0.5


class Meter:
    """What a module measures while it runs."""

    def __init__(self) -> None:
        self.seen, self.trained = 0, False


class Annealed(nn.Module):
    """A temperature that falls."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        if self.training:
            self.temperature = max(0.1, self.temperature * 0.8)
        return torch.softmax(h / self.temperature, 1)


class Average(nn.Module):
    """A buffer that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.count: Tensor
        self.register_buffer("count", torch.tensor(0))

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.count += 1
        return h - self.mean


class Reassigned(nn.Module):
    """A buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h + self.mean


class Momentum(nn.Module):
    """A slow copy of a layer, written by forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.slow.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                slow.mul_(0.5).add_(fast, alpha=0.5)
            target = self.slow(h)
        y: Tensor = self.fast(h) + target
        return y


class Remembers(nn.Module):
    """Keeps values of the last call, one of them with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.summary: dict[str, Tensor] = {}

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        self.last = h * 2
        self.summary = {"mean": h.detach().mean(), "largest": h.detach().max()}
        return h + 0.1 * self.last


class Carries(nn.Module):
    """A hidden state that goes on from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.zeros(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        state = torch.tanh(self.mix(self.hidden) + h.mean(0))
        self.hidden = state.detach()
        return h + state


class History(nn.Module):
    """A list that grows, and a deque that forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[Tensor] = []
        self.recent: collections.deque[Tensor] = collections.deque(maxlen=3)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        self.recent.append(h.detach().mean(0))
        self.means.append(h.detach().mean())
        return h + self.recent[0]


class Named(nn.Module):
    """A dictionary that is filled by the first call and read by the others."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Tensor] = {}

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        key = "train" if self.training else "eval"
        if key not in self.table:
            self.table[key] = h.detach().mean(0)
        return h - 0.1 * self.table[key]


class Alternates(nn.Module):
    """A branch that Python state chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.turn = False

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        self.turn = not self.turn
        y: Tensor = self.left(h) if self.turn else self.right(h)
        return y


class Logs(nn.Module):
    """Numbers that are read off tensors to be logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged, self.rows = 0.0, 0
        self.values: list[float] = []

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        self.logged = h.detach().mean().item()
        self.rows = int((h.detach().sum(1) > 0).sum())
        self.values = h.detach()[0].tolist()
        return h * 0.75


class Lazy(nn.Module):
    """A layer that gets its size from the first call, and one made by it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.inner(h)
        return y


class DrawsPython(nn.Module):
    """A draw from Python's random stream."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        return h * random.uniform(0.5, 1.5) if self.training else h


class DrawsNumpy(nn.Module):
    """A draw from NumPy's random stream."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        return h * float(np.random.rand()) if self.training else h


class DropsItself(nn.Module):
    """A layer that is left out at random (stochastic depth)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        if self.training and torch.rand(()) < 0.5:
            return h
        y: Tensor = h + self.inner(h)
        return y


class OwnGenerator(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        return h + torch.rand(WIDTH, generator=self.generator)
