"""Products: by levels, of transposes, of matrices packed from a tree of blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.hierarchical import groups
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank
from graphopt.hierarchical.clusters import Cluster
from graphopt.hierarchical.packed import ancestors, pack
from tests.hierarchical.oracles import points

_DOUBLE = torch.float64


def _matrix(n: int = 300, tolerance: float = 1e-9, d: int = 2) -> tuple[h.HMatrix, Tensor]:
    x = points("uniform", n, d)
    tree = h.by_points(x, 16)
    found = h.from_kernel(h.Matern32(scale=0.4), tree, tolerance=tolerance)
    return found, h.Matern32(scale=0.4)(x, x)


def _level(found: h.HMatrix, inner: Tensor, number: int) -> Tensor:
    """The entries whose two clusters first meet on a level, by brute force."""
    tree, kept = found.rows, torch.zeros_like(inner)
    for cluster in tree.level(number):
        own = slice(cluster.start, cluster.stop)
        kept[own, own] = inner[own, own]
        for child in cluster.children:
            kept[child.start : child.stop, child.start : child.stop] = 0
    return kept


@pytest.mark.parametrize("n", [1, 15, 40, 300])
def test_levels_add_up_and_are_those_of_the_ancestors(n: int) -> None:
    found, exact = _matrix(n)
    order = found.rows.order
    inner = exact[order][:, order]
    v = torch.randn(n, 3, dtype=_DOUBLE)
    total = torch.zeros_like(v)
    for number in range(found.rows.depth + 1):
        kept = _level(found, inner, number)
        product = found.apply_level(number, v)
        assert float((product - kept @ v).norm(dim=0).max()) <= 1e-7 * float(inner.norm())
        total += product
        norms = [
            float(kept[c.start : c.stop, c.start : c.stop].norm()) ** 2
            for c in found.rows.level(number)
        ]
        torch.testing.assert_close(
            found.level_norms(number), torch.tensor(norms, dtype=_DOUBLE), rtol=1e-6, atol=1e-9
        )
    whole = found.rows.to_positions(found @ found.rows.to_original(v))
    torch.testing.assert_close(total, whole)


def test_levels_of_two_trees_have_no_ancestors() -> None:
    rows, columns = (h.by_points(points("uniform", n, 1), 16) for n in (60, 80))
    found = h.from_kernel(h.Exponential(), rows, columns)
    with pytest.raises(ValueError, match="no common ancestors"):
        found.apply_level(0, torch.ones(80, dtype=_DOUBLE))


@settings(max_examples=20, deadline=None)
@given(level=st.integers(0, 6), other=st.integers(0, 6), data=st.data())
def test_ancestors_by_walking_up(level: int, other: int, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, 2**level - 1))
    j = data.draw(st.integers(0, 2**other - 1))
    pairs = h.admissibility.Pairs(level, other, torch.tensor([i]), torch.tensor([j]))
    while level > other:
        level, i = level - 1, i // 2
    while other > level:
        other, j = other - 1, j // 2
    while i != j:
        level, i, j = level - 1, i // 2, j // 2
    assert ancestors(pairs, 6).tolist() == [level]


@pytest.mark.parametrize("dtype", [torch.float32, _DOUBLE])
def test_products_of_vectors_matrices_and_strided_tensors(dtype: torch.dtype) -> None:
    found, exact = _matrix()
    if dtype is torch.float32:
        found = h.from_kernel(h.Matern32(scale=0.4), found.rows, tolerance=1e-4, dtype=dtype)
    wide = torch.randn(300, 8, dtype=dtype)
    for x in (wide[:, 0], wide, wide[:, ::2], wide.T.contiguous().T, wide[:, :0]):
        product = found.apply(x) if x.numel() else None
        assert (found @ x).shape == x.shape
        if product is not None:
            difference = product.value.double() - exact @ x.double()
            assert float(torch.linalg.vector_norm(difference, dim=0).max()) <= product.bound
    torch.testing.assert_close(found.T @ wide, found @ wide)


def test_products_in_small_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = _matrix()
    x = torch.randn(300, 2, dtype=_DOUBLE)
    expected = found @ x
    monkeypatch.setattr(groups, "_CHUNK", 100)
    torch.testing.assert_close(found @ x, expected, rtol=1e-12, atol=1e-12)


def _tree_of(cluster: Cluster, other: Cluster, values: Tensor, depth: int) -> Block:
    """Blocks of every kind, exact: products of thin matrices, with and without a core."""
    own = values[cluster.start : cluster.stop, other.start : other.stop]
    if cluster is other and cluster.children and depth:
        return Grid(
            tuple(
                tuple(_tree_of(a, b, values, depth - 1) for b in other.children)
                for a in cluster.children
            )
        )
    if cluster is other:
        return Dense(own)
    u, s, v = torch.linalg.svd(own, full_matrices=False)
    if depth % 2:
        return LowRank(u, v.T, torch.diag(s))
    return LowRank(u * s, v.T)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_tree_of_blocks_is_packed(depth: int) -> None:
    tree = h.by_index(100, 12)
    values = torch.randn(100, 5, dtype=_DOUBLE) @ torch.randn(5, 100, dtype=_DOUBLE)
    values += torch.diag(torch.rand(100, dtype=_DOUBLE))
    found = h.HMatrix(_tree_of(tree.root, tree.root, values, depth), tree, tree, 0.0)
    x = torch.randn(100, 4, dtype=_DOUBLE)
    product = found.apply(x)
    assert float((product.value - values @ x).norm(dim=0).max()) <= product.bound + 1e-11
    torch.testing.assert_close(found.T @ x, values.T @ x)
    torch.testing.assert_close(found.dense(), values)
    torch.testing.assert_close(h.HMatrix(None, tree, tree, 0.0, found.packed).dense(), values)
    for number in range(depth + 1):
        # The dense blocks on the diagonal are whole clusters of the last level.
        kept = _level(found, values, number) if number < depth else values
        own = [kept[c.start : c.stop, c.start : c.stop].norm() ** 2 for c in tree.level(number)]
        torch.testing.assert_close(found.level_norms(number), torch.stack(own))


def test_blocks_beside_clusters_are_refused() -> None:
    tree = h.by_index(100, 50)
    halves = torch.eye(100).split([40, 60])
    root = Grid(tuple((Dense(half),) for half in halves))
    with pytest.raises(ValueError, match="not one of two clusters"):
        pack(root, tree, tree)


def test_memory_of_shared_bases_counts_once() -> None:
    found, exact = _matrix(800, 1e-6)
    own = sum(t.numel() for g in found.packed.groups for t in g.tensors) * 8
    assert found.nbytes < own  # bases are in the list twice, left and right
    assert found.nbytes < exact.nbytes / 2
    assert found.T.nbytes == found.nbytes


def test_bounds_know_of_short_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch may multiply in fewer bits, the rounding of products is larger."""
    found = h.from_kernel(
        h.Exponential(),
        h.by_points(points("uniform", 60, 1), 16),
        tolerance=1e-4,
        dtype=torch.float32,
    )
    x = torch.ones(60)
    usual = found.apply(x).bound
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    # The transpose is the same matrix, and has not been asked before.
    assert found.T.apply(x).bound > 100 * usual
