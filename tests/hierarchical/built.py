"""Matrices in blocks from dense ones, made by singular value decompositions alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank
from graphopt.hierarchical.clusters import Cluster, by_points
from graphopt.hierarchical.matrix import HMatrix

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": lambda r: (-2 * r).exp(),
    "matern": lambda r: (1 + 4 * r) * (-4 * r).exp(),
    "log": lambda r: (r + 0.05).log(),
    "inverse": lambda r: 1 / (r + 0.1),
}
STRUCTURES = ("hodlr", "blr", "strong")


def points(n: int, dimensions: int, seed: int = 0) -> Tensor:
    """[n, d] in the unit cube, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, dimensions, dtype=torch.float64, generator=generator)


def kernel(name: str, where: Tensor, shift: float = 1.0) -> Tensor:
    """[n, n], symmetric, with `shift` on the diagonal."""
    distances = (where.unsqueeze(1) - where).square().sum(-1).sqrt()
    return KERNELS[name](distances) + shift * torch.eye(len(where), dtype=where.dtype)


def build(
    values: Tensor,
    where: Tensor,
    structure: str,
    tolerance: float,
    leaf: int = 16,
    dtype: torch.dtype = torch.float64,
) -> HMatrix:
    """Of `values` [n, n] in the order of the points; its bound is measured."""
    tree = by_points(where, leaf)
    inner = values[tree.order][:, tree.order]
    size = float(inner.norm()) * tolerance / math.sqrt(len(values) / leaf) / 4

    def one(rows: Cluster, columns: Cluster) -> Block:
        own = inner[rows.start : rows.stop, columns.start : columns.stop]
        if _admissible(rows, columns, structure):
            return truncated(own, size, dtype)
        if not rows.children:
            return Dense(own.to(dtype))
        if structure == "blr":
            parts = [(c.start, c.stop) for c in tree.level(tree.depth)]
            return Grid(
                tuple(
                    tuple(
                        Dense(inner[a:b, c:d].to(dtype))
                        if a == c
                        else truncated(inner[a:b, c:d], size, dtype)
                        for c, d in parts
                    )
                    for a, b in parts
                )
            )
        return Grid(tuple(tuple(one(r, c) for c in columns.children) for r in rows.children))

    found = HMatrix(one(tree.root, tree.root), tree, tree, 0.0)
    far = float((found.dense().double() - values).norm())
    return HMatrix(found.root, tree, tree, far * (1 + 1e-6) + 1e-15 * float(values.norm()))


def truncated(values: Tensor, tolerance: float, dtype: torch.dtype = torch.float64) -> LowRank:
    """The best approximation within `tolerance`, absolute."""
    u, s, vt = torch.linalg.svd(values, full_matrices=False)
    tail = s.flip(0).square().cumsum(0).flip(0).sqrt()
    rank = int((tail > tolerance).sum())
    return LowRank((u[:, :rank] * s[:rank]).to(dtype), vt[:rank].T.contiguous().to(dtype))


@dataclass(frozen=True)
class Case:
    """A kernel matrix, what stands for it, and what was asked for."""

    name: str
    dimensions: int
    structure: str
    n: int
    dtype: torch.dtype
    tolerance: float
    seed: int

    @property
    def values(self) -> Tensor:
        """[n, n] in float64; its eigenvalues are at least 1 where the kernel is definite."""
        return kernel(self.name, points(self.n, self.dimensions, self.seed))

    @property
    def matrix(self) -> HMatrix:
        """In blocks."""
        where = points(self.n, self.dimensions, self.seed)
        return build(self.values, where, self.structure, self.tolerance, dtype=self.dtype)


def cases(definite: bool = False) -> st.SearchStrategy[Case]:
    """Kernels, geometries, structures, sizes, dtypes and tolerances."""
    return st.builds(
        Case,
        st.sampled_from(["exponential", "matern"] if definite else sorted(KERNELS)),
        st.integers(1, 3),
        st.sampled_from(STRUCTURES),
        st.sampled_from([1, 5, 33, 90, 128]),
        st.sampled_from([torch.float32, torch.float64]),
        st.sampled_from([1e-2, 1e-4, 1e-6]),
        st.integers(0, 10**6),
    )


def few() -> list[Case]:
    """One case of each kernel and structure, in float64."""
    return [
        Case(name, 1 + (i + j) % 3, structure, 100, torch.float64, 1e-6, 0)
        for i, name in enumerate(sorted(KERNELS))
        for j, structure in enumerate(STRUCTURES)
    ]


def _admissible(rows: Cluster, columns: Cluster, structure: str) -> bool:
    if structure == "blr":
        return False
    if structure == "hodlr":
        return rows.index != columns.index
    return min(rows.diameter, columns.diameter) <= 2 * rows.distance(columns)
