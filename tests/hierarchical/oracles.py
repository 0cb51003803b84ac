"""Kernels by brute force, and points that are easy or nasty."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[m, n] by a loop over coordinates, float64."""
    total = torch.zeros(len(x), len(y), dtype=torch.float64)
    for i in range(x.shape[1]):
        total += (x[:, i].double()[:, None] - y[:, i].double()[None, :]) ** 2
    return total.sqrt()


def _power(r: Tensor, at_zero: float) -> Tensor:
    return torch.where(r == 0, torch.tensor(at_zero, dtype=r.dtype), 1 / r)


def _log(r: Tensor, at_zero: float) -> Tensor:
    return torch.where(r == 0, torch.tensor(at_zero, dtype=r.dtype), r.log())


# Of each: the class, and the closed form of r / scale.
KERNELS: dict[str, tuple[type[h.kernels.Radial], Callable[[Tensor], Tensor]]] = {
    "exponential": (h.Exponential, lambda r: torch.exp(-r)),
    "matern32": (h.Matern32, lambda r: (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)),
    "matern52": (
        h.Matern52,
        lambda r: (1 + math.sqrt(5) * r + 5 * r**2 / 3) * torch.exp(-math.sqrt(5) * r),
    ),
    "gaussian": (h.Gaussian, lambda r: torch.exp(-0.5 * r**2)),
    "log": (h.Logarithm, lambda r: _log(r, 0.0)),
    "inverse": (h.InverseDistance, lambda r: _power(r, 0.0)),
}

GEOMETRIES = ("uniform", "clusters", "line", "grid", "offset")


def points(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    """[n, d] in float64."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(n, d, generator=generator, dtype=torch.float64)
    if kind == "clusters":
        centres = torch.rand(5, d, generator=generator, dtype=torch.float64)
        which = torch.randint(0, 5, (n,), generator=generator)
        found = centres[which] + 0.01 * (found - 0.5) * torch.rand(
            n, 1, generator=generator, dtype=torch.float64
        )
    elif kind == "line":
        found = found[:, :1] * torch.arange(1, d + 1, dtype=torch.float64)
    elif kind == "grid":
        # Coarse, so that many points coincide.
        found = (found * 7).round() / 7
    elif kind == "offset":
        found = 1000 + found * torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)[:d]
    return found


def kernels() -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(KERNELS))


def geometries() -> st.SearchStrategy[tuple[str, int]]:
    return st.tuples(st.sampled_from(GEOMETRIES), st.integers(1, 3))
