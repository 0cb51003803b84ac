"""Factors in HODLR form, and what random probes say of their errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.errors import IndefiniteError
from graphopt.hierarchical.probability import Probed, norm_factor, trace_factor
from graphopt.hierarchical.processes.hodlr import whiten
from graphopt.hierarchical.processes.inverse import Inverse
from graphopt.hierarchical.processes.kernel_operator import KernelOperator
from graphopt.hierarchical.processes.whitening import Layout, Whitening
from tests.hierarchical.oracles import points

_DOUBLE = torch.float64


def _operator(n: int, d: int = 2, scale: float = 0.3, leaf: int = 16) -> KernelOperator:
    kernel = h.Matern32(scale=scale)
    tree = h.by_points(points("uniform", n, d), leaf)
    return KernelOperator(h.from_kernel(kernel, tree, tolerance=1e-10), kernel)


def _dense(operator: KernelOperator, noise: float) -> Tensor:
    own = operator.tree.points
    assert own is not None
    return h.Matern32(scale=0.3)(own, own) + noise * torch.eye(len(own), dtype=_DOUBLE)


def _full(whitening: Whitening, n: int) -> Tensor:
    """L^-1 with all entries."""
    layout = whitening.layout
    identity = layout.pad(torch.eye(n, dtype=_DOUBLE))
    return layout.cut(whitening.forward(identity))


@settings(max_examples=12)
@given(
    n=st.integers(1, 260),
    d=st.integers(1, 3),
    accuracy=st.sampled_from([1e-2, 1e-3, 1e-6]),
    leaf=st.sampled_from([16, 40]),
)
def test_a_factor_whitens_its_matrix(n: int, d: int, accuracy: float, leaf: int) -> None:
    operator = _operator(n, d)
    matrix = _dense(operator, 0.1)
    generator = torch.Generator().manual_seed(0)
    found = whiten(operator, 0.1, accuracy, leaf=leaf, generator=generator)
    white = _full(found, n)
    away = white @ matrix @ white.T - torch.eye(n, dtype=_DOUBLE)
    size = float(torch.linalg.matrix_norm(away))
    assert size <= 30 * accuracy + 1e-9
    inverse = Inverse(operator, 0.1, found, semidefinite=True, generator=generator)
    assert size <= inverse.deviation
    determinant = inverse.log_determinant
    exact = float(torch.linalg.slogdet(matrix)[1])
    assert abs(determinant.value - exact) <= determinant.error + determinant.wrong + 1e-9
    right = torch.randn(n, 3, dtype=_DOUBLE, generator=generator)
    solved = inverse.solve(right, 1e-9)
    torch.testing.assert_close(solved.x, torch.linalg.solve(matrix, right), atol=1e-6, rtol=1e-6)
    form = inverse.quadratic(right, solved)
    exact_form = (right * torch.linalg.solve(matrix, right)).sum(0)
    assert bool(((form.value - exact_form).abs() <= form.error + form.wrong + 1e-10).all())


def test_forward_and_backward_are_transposes() -> None:
    operator = _operator(203)
    found = whiten(operator, 0.1, 1e-3, leaf=32)
    x, y = torch.randn(2, found.layout.rows, 4, dtype=_DOUBLE).unbind(0)
    torch.testing.assert_close((x * found.forward(y)).sum(), (found.backward(x) * y).sum())


def test_a_smaller_accuracy_needs_larger_ranks() -> None:
    operator = _operator(500)
    coarse, fine = (whiten(operator, 0.1, accuracy, leaf=32) for accuracy in (1e-2, 1e-5))
    assert all(a < b for a, b in zip(coarse.ranks, fine.ranks, strict=True))
    assert coarse.nbytes < fine.nbytes


def test_a_matrix_that_is_not_positive_definite() -> None:
    operator = _operator(100)
    with pytest.raises(IndefiniteError, match=r"(?s)not positive definite.*try: add more"):
        whiten(operator, -0.5, 1e-3)


def test_leaves_are_padded() -> None:
    tree = h.by_points(points("uniform", 101, 2), 16)
    layout = Layout.of(tree, 30)
    assert layout.size << layout.depth == layout.rows >= 101
    x = torch.randn(101, 2, dtype=_DOUBLE)
    assert torch.equal(layout.cut(layout.pad(x)), x)


@settings(max_examples=20)
@given(
    rank=st.integers(1, 30),
    probes=st.sampled_from([16, 64]),
    seed=st.integers(0, 10**6),
    sign=st.booleans(),
)
def test_probes_bound_what_they_have_not_seen(
    rank: int, probes: int, seed: int, sign: bool
) -> None:
    """For all of 50 draws; norms, traces and log-determinants."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(30, rank, dtype=_DOUBLE, generator=generator))[0]
    values = 0.02 * torch.rand(rank, dtype=_DOUBLE, generator=generator)
    if sign:
        values = values - 0.01
    matrix = q * values @ q.T
    for _ in range(50):
        omega = torch.randn(30, probes, dtype=_DOUBLE, generator=generator)
        found = Probed.of(matrix @ omega, omega)
        assert float(matrix.norm()) <= found.norm
        assert abs(float(values.sum()) - found.trace) <= found.trace_error
        value, bound = found.log_determinant()
        assert abs(value - float(torch.log1p(values).sum())) <= bound


def test_factors_of_probability_against_chi_square() -> None:
    """With rank one the norm is a chi-square variable; of two probes P = 1 - exp(-x / 2)."""
    failure = 1e-3
    exact = math.sqrt(2 / (-2 * math.log(1 - failure)))
    assert exact <= norm_factor(2, failure) <= 3 * exact
    assert norm_factor(10**6) == pytest.approx(1, abs=0.02)
    assert trace_factor(10**8) == pytest.approx(0, abs=0.01)
