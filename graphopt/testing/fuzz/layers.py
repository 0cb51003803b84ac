"""Ordinary layers, randomness and writes in place, each of [batch, WIDTH] and returning the same.

Every class is one habit of daily code. What a class needs of Python state is in its constructor, so
that two instances made under the same random stream are equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 6


class Linear(nn.Module):
    """A linear layer with a smooth activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        return torch.tanh(self.inner(h))


class Normalised(nn.Module):
    """Batch norm, whose statistics move in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.norm(h)
        return y


class Attention(nn.Module):
    """Self-attention over the batch, taken as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.attend(h[None], h[None], h[None], need_weights=False)[0][0]
        return y


class Recurrent(nn.Module):
    """A GRU over the batch, taken as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.cells(h[None])[0][0]
        return y


class Lookup(nn.Module):
    """An embedding of what the values round to."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        ids = h.detach().mean(1).mul(2).long().clamp(0, 4)
        y: Tensor = h + self.table(ids)
        return y


class Drops(nn.Module):
    """Dropout."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        return F.dropout(h, 0.5, self.training)


class Noisy(nn.Module):
    """Adds noise, in train mode only, of two kinds of draws."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
            h = h * torch.bernoulli(torch.full((h.shape[0], 1), 0.7))
        return h


class AddsInPlace(nn.Module):
    """Writes into a value of its own, with and without indices."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.inner(h)
        y += h
        y[:, 0] = 0.5
        y[:, 1:3].mul_(2)
        y.t()[4].add_(1)
        return y.relu_()


class Masks(nn.Module):
    """Fills where a condition on values holds."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        h = h.clone()
        h[h < -1] = -1.0
        h.masked_fill_(h > 2, 2.0)
        return h


class Scatters(nn.Module):
    """Adds rows at indices into zeros."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        ids = torch.arange(h.shape[0]) % 2
        return h + torch.zeros(2, WIDTH).index_add_(0, ids, h)[ids]


class WritesWhatItGets(nn.Module):
    """Changes its argument in place, which may be the model's own input."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        with torch.no_grad():
            h.mul_(0.5)
        return h + 0


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].clamp(-ctx.limit, ctx.limit), None


class OwnGradient(nn.Module):
    """An autograd.Function whose gradient is not the derivative."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = _Clipped.apply(h, 0.1)  # type: ignore[no-untyped-call]
        return y


class ChangesGradient(nn.Module):
    """A hook on an intermediate value."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y = h * 1.5
        if y.requires_grad:
            y.register_hook(lambda g: g * 0.5)  # type: ignore[no-untyped-call]
        return y


class Selects(nn.Module):
    """As many values as the data says."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        chosen = h[h > 0]
        return h + chosen.sum() / (chosen.numel() + 1)


class Counts(nn.Module):
    """Sizes that are read off the data."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        rows = torch.nonzero(h.detach().sum(1) > 0).flatten()
        return h.index_add(0, rows, torch.ones(len(rows), WIDTH))


class Checks(nn.Module):
    """The checks on values that library code makes."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        if not torch.isfinite(h).all():
            raise ValueError("not finite")
        assert h.abs().max() < 1e6, "too large"
        return h * 1.25


class WithoutGradient(nn.Module):
    """A part that no gradient passes, and one within it that would."""

    def __init__(self) -> None:
        super().__init__()
        self.target, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        with torch.no_grad():
            t = self.target(h)
            with torch.enable_grad():
                u = self.inner(h.detach())
        y: Tensor = h + 0.1 * t + 0.1 * u
        return y


class Mixed(nn.Module):
    """A region of lower precision, and one that is kept out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.low(h)
            with torch.autocast("cpu", enabled=False):
                z: Tensor = self.high(y.float())
        return z + h
