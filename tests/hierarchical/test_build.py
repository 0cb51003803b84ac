"""Kernel matrices and dense ones in blocks: the error is within the bound, the bound as asked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.hierarchical import kernel_matrix
from graphopt.hierarchical.blocks import Dense, LowRank, placed
from graphopt.hierarchical.compress import recompress, recompress_batch
from tests.hierarchical.oracles import KERNELS, distances, geometries, kernels, points

_DOUBLE = torch.float64
TOLERANCES = st.sampled_from(
    [(1e-1, _DOUBLE), (1e-3, _DOUBLE), (1e-6, _DOUBLE), (1e-9, _DOUBLE), (1e-4, torch.float32)]
)


def check(found: h.HMatrix, exact: Tensor, tolerance: float, zero: float = 0.0) -> float:
    """Error over bound, after the three comparisons that matter."""
    error = float((found.dense() - exact).norm())
    # What the comparison itself rounds.
    assert error <= found.bound + 1e-14 * float(exact.norm())
    assert found.bound <= max(tolerance * float(exact.norm()), zero)
    x = torch.randn(exact.shape[1], 3, dtype=found.dtype)
    product = found.apply(x)
    difference = product.value.double() - exact @ x.double()
    assert float(difference.norm(dim=0).max()) <= product.bound
    return error / found.bound if found.bound else 0.0


@settings(max_examples=25, deadline=None)
@given(
    name=kernels(),
    geometry=geometries(),
    n=st.integers(1, 400),
    leaf=st.sampled_from([8, 20]),
    scale=st.sampled_from([0.03, 0.3, 2.0]),
    eta=st.sampled_from([1.0, 2.0]),
    goal=TOLERANCES,
)
def test_symmetric_kernel_matrices(
    name: str,
    geometry: tuple[str, int],
    n: int,
    leaf: int,
    scale: float,
    eta: float,
    goal: tuple[float, torch.dtype],
) -> None:
    kind, form = KERNELS[name]
    x = points(geometry[0], n, geometry[1])
    exact = form(distances(x, x) / scale)
    if not bool(exact.any()):
        return
    tree = h.by_points(x, leaf)
    found = h.from_kernel(
        kind(scale=scale), tree, tolerance=goal[0], rule=h.Strong(eta), dtype=goal[1]
    )
    assert found.dtype is goal[1]
    check(found, exact, goal[0])


@settings(max_examples=15, deadline=None)
@given(
    name=kernels(),
    geometry=geometries(),
    m=st.integers(1, 300),
    n=st.integers(1, 300),
    goal=TOLERANCES,
)
def test_kernel_matrices_of_two_sets(
    name: str, geometry: tuple[str, int], m: int, n: int, goal: tuple[float, torch.dtype]
) -> None:
    kind, form = KERNELS[name]
    x, y = points("uniform", m, geometry[1]), points(*(geometry[0], n, geometry[1]), seed=1)
    exact = 2.0 * form(distances(x, y))
    rows, columns = h.by_points(x, 16), h.by_points(y, 12)
    found = h.from_kernel(kind(variance=2.0), rows, columns, tolerance=goal[0], dtype=goal[1])
    zero = 0.0 if name in ("log", "inverse") else 2e-12 * math.sqrt(m * n)
    check(found, exact, goal[0], zero)
    check(found.T, exact.T, goal[0], zero)


@pytest.mark.parametrize(("name", "d"), [("exponential", 2), ("log", 2), ("matern52", 1)])
def test_larger_matrices_take_little_memory_and_few_blocks_are_interpolated_in_vain(
    name: str, d: int
) -> None:
    kind, form = KERNELS[name]
    x = points("uniform", 2000, d)
    found = h.from_kernel(kind(), h.by_points(x, 32), tolerance=1e-5)
    assert check(found, form(distances(x, x)), 1e-5) > 0.05
    assert found.nbytes < (0.06 if d == 1 else 0.2) * 2000 * 2000 * 8


def test_kernels_that_are_too_rough_for_large_boxes_are_split_further() -> None:
    """A Gaussian of a tiny scale: boxes above the leaves would need too many nodes."""
    x = points("uniform", 600, 2)
    kind, form = KERNELS["gaussian"]
    found = h.from_kernel(kind(scale=0.004), h.by_points(x, 8), tolerance=1e-8)
    check(found, form(distances(x, x) / 0.004), 1e-8)


def test_a_large_cluster_that_cannot_be_interpolated_is_not_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_matrix, "_MOST", 20)
    x = points("uniform", 500, 1)
    kind, form = KERNELS["exponential"]
    found = h.from_kernel(kind(scale=0.001), h.by_points(x, 16), tolerance=1e-10)
    check(found, form(distances(x, x) / 0.001), 1e-10)


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("rule", [h.Weak(), h.Flat()])
def test_blocks_of_clusters_that_touch(name: str, rule: h.Weak | h.Flat) -> None:
    x = points("uniform", 300, 1)
    kind, form = KERNELS[name]
    found = h.from_kernel(kind(), h.by_points(x, 16), tolerance=1e-6, rule=rule)
    check(found, form(distances(x, x)), 1e-6)


def test_many_nodes_do_not_lose_more_by_rounding_than_was_asked_for() -> None:
    """Clusters that nearly touch: some hundred nodes are fewer than their points."""
    x = points("uniform", 2400, 1)
    kind, form = KERNELS["exponential"]
    exact = form(distances(x, x) / 0.3)
    for tolerance in (1e-6, 1e-12):
        tree = h.by_points(x, 64)
        found = h.from_kernel(kind(scale=0.3), tree, tolerance=tolerance, rule=h.Weak())
        check(found, exact, tolerance)


def test_a_function_of_ones_own() -> None:
    """Nothing is known of it, so everything is evaluated, and the bound is exact."""

    def rational(x: Tensor, y: Tensor) -> Tensor:
        return 1 / (1 + (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)) ** 2

    x = points("clusters", 500, 2)
    found = h.from_kernel(rational, h.by_points(x, 16), tolerance=1e-7)
    exact = 1 / (1 + distances(x, x) ** 2) ** 2
    assert check(found, exact, 1e-7) > 0.9
    assert found.nbytes < 0.5 * 500 * 500 * 8


def _values(n: int, seed: int) -> Tensor:
    x = points("uniform", n, 1, seed).sort(0)[0]
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=_DOUBLE)
    return torch.exp(-distances(x, x)) * torch.linspace(1, 2, n, dtype=_DOUBLE) + 1e-7 * noise


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 200),
    rule=st.sampled_from([h.Weak(), h.Flat(), h.Flat(2)]),
    method=st.sampled_from(["svd", "random"]),
    goal=TOLERANCES,
    seed=st.integers(0, 9),
)
def test_dense_matrices(
    n: int, rule: h.Weak | h.Flat, method: str, goal: tuple[float, torch.dtype], seed: int
) -> None:
    values = _values(n, seed).to(goal[1])
    tree = h.by_index(n, 16)
    found = h.from_dense(values, tree, tolerance=goal[0], rule=rule, method=method)  # type: ignore[arg-type]
    check(found, values.double(), goal[0])


def test_dense_matrices_over_two_trees_of_points() -> None:
    x, y = points("uniform", 150, 2), points("line", 220, 2, 1)
    exact = torch.exp(-distances(x, y))
    rows, columns = h.by_points(x, 20), h.by_points(y, 20)
    for values in (exact, exact.T.contiguous().T, exact.repeat(1, 2)[:, :220]):
        found = h.from_dense(values, rows, columns, tolerance=1e-5, rule=h.Strong())
        check(found, exact, 1e-5)


def test_a_block_that_low_rank_does_not_make_smaller_stays_dense() -> None:
    values = torch.randn(64, 64, dtype=_DOUBLE)
    found = h.from_dense(values, h.by_index(64, 16), tolerance=1e-3)
    assert all(isinstance(place.block, Dense) for place in placed(found.root))
    assert found.nbytes == values.nbytes
    assert found.bound == 0


def test_a_matrix_of_zeros() -> None:
    found = h.from_dense(torch.zeros(70, 70), h.by_index(70, 16))
    assert found.bound == 0
    assert not bool(found.dense().any())
    assert not bool((found @ torch.ones(70)).any())


def test_blocks_of_the_tree_are_views() -> None:
    tree = h.by_points(points("uniform", 300, 2), 16)
    found = h.from_kernel(h.Exponential(), tree, tolerance=1e-4)
    before = found.nbytes
    places = list(placed(found.root))
    assert found.nbytes == before
    bases = {id(p.block.left.untyped_storage()) for p in places if isinstance(p.block, LowRank)}
    assert len(places) > 100
    assert before == found.packed.nbytes
    assert bases


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(0, 30),
    decay=st.sampled_from([0.1, 0.5, 1.0]),
    tolerance=st.sampled_from([0.0, 1e-12, 1e-6, 1e-2, 1e9]),
    dtype=st.sampled_from([_DOUBLE, torch.float32]),
)
def test_recompression_is_as_exact_as_it_says(
    m: int, n: int, k: int, decay: float, tolerance: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(m * n + k)
    left = torch.randn(m, k, generator=generator, dtype=_DOUBLE)
    left = (left * decay ** torch.arange(k)).to(dtype)
    right = torch.randn(n, k, generator=generator, dtype=_DOUBLE).to(dtype)
    found, other, error = recompress(left, right, tolerance)
    assert found.dtype is dtype
    exact = left.double() @ right.double().T
    assert float((exact - found.double() @ other.double().T).norm()) <= error
    size = float(left.double().norm() * right.double().norm())
    assert error <= tolerance + 40 * k * size * torch.finfo(dtype).eps
    values = torch.linalg.svdvals(exact) if k else torch.zeros(1)
    kept = found.shape[1]
    if kept:
        assert float(values[kept - 1 :].norm()) > tolerance * (1 - 1e-9) - 1e-12 * size
    if tolerance == 1e9:
        assert kept == 0


def test_products_of_a_batch_are_cut_together() -> None:
    left = torch.randn(3, 20, 8, dtype=_DOUBLE) * torch.tensor([1.0, 1e-9, 0.0])[:, None, None]
    right = torch.randn(3, 15, 8, dtype=_DOUBLE)
    found, other, errors = recompress_batch(left, right, torch.full((3,), 1e-3, dtype=_DOUBLE))
    assert found.shape == (3, 20, 8)
    assert not bool(found[1:].any())
    exact = left @ right.mT
    assert bool(((exact - found @ other.mT).norm(dim=(1, 2)) <= errors).all())
