"""Derivatives of kernels, products of them, and gradients of likelihoods: within their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.hierarchical.interpolation import Boxes, Estimate, chebyshev, lagrange
from graphopt.hierarchical.kernel_derivatives import ByScale, by_scales
from graphopt.hierarchical.kernels import Analytic
from graphopt.hierarchical.processes.interpolated import product
from graphopt.hierarchical.processes.kernel_operator import KernelOperator
from tests.hierarchical.oracles import KERNELS, geometries, points

_DOUBLE = torch.float64
_POSITIVE = ("exponential", "gaussian", "matern32", "matern52")


def _parameter(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=_DOUBLE, requires_grad=True)


@pytest.mark.parametrize("name", _POSITIVE)
def test_closed_forms_are_what_autograd_finds(name: str) -> None:
    x = points("grid", 40, 2)
    for scale in (_parameter(0.3), _parameter([0.2, 0.5])):
        kernel = KERNELS[name][0](scale, 1.3)
        found = by_scales(kernel)
        assert found is not None
        for i, change in enumerate(found):
            weights = torch.randn(40, 40, dtype=_DOUBLE)
            wanted = torch.autograd.grad((weights * kernel(x, x)).sum(), scale)[0].reshape(-1)[i]
            entry = scale.detach().reshape(-1)[i]
            assert float((weights * change(x, x)).sum() / entry) == pytest.approx(
                float(wanted), rel=1e-10, abs=1e-10
            )


@pytest.mark.parametrize("name", _POSITIVE)
def test_forms_know_their_size_and_slope(name: str) -> None:
    change = ByScale(KERNELS[name][0](1.0, 1.7), None)
    r = torch.linspace(1e-4, 12, 20001, dtype=_DOUBLE)
    values = change(torch.zeros(1, 1, dtype=_DOUBLE), r.unsqueeze(1))[0]
    slopes = (values[1:] - values[:-1]).abs() / (r[1:] - r[:-1])
    for start in range(0, 20000, 1999):
        low = r[start].square()
        for stop in (start + 1, start + 500, 20000):
            end = min(stop, 20000)
            size = float(change.size(low, r[end].square()))
            assert float(values[start : end + 1].max()) <= size * (1 + 1e-12)
        assert float(slopes[start:].max()) <= float(change.slope(low)) * (1 + 1e-9)


@pytest.mark.parametrize("name", _POSITIVE)
def test_interpolated_forms_are_within_their_bounds(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = KERNELS[name][0](_parameter([0.4, 0.9]))
    low = torch.tensor([[0.0, 0.0], [0.9, 0.7]], dtype=_DOUBLE)
    high = low + torch.tensor([0.4, 0.3], dtype=_DOUBLE)
    x = [low[i] + torch.rand(60, 2, generator=generator).double() * (high - low)[i] for i in (0, 1)]
    scalar = ByScale(KERNELS[name][0](0.6), None)
    for change in (*(by_scales(kernel) or ()), scalar):
        boxes = Boxes.of(low, high, change.scales(2))
        first, second = (boxes[torch.tensor([i])] for i in (0, 1))
        estimate = Estimate.of(change, first, second, 1e-15)
        exact = change(x[0], x[1])
        for count in (2, 4, 12):
            spread, at = _interpolation(x, low, high, count)
            found = spread[0] @ change(at[0], at[1]) @ spread[1].T
            entry, lost = estimate.bounds([count, count])
            assert float((found - exact).abs().max()) <= float(entry + lost)
        assert float(entry) < 1e-2 * float(exact.abs().max())


def _interpolation(
    x: list[Tensor], low: Tensor, high: Tensor, count: int
) -> tuple[list[Tensor], Tensor]:
    at = chebyshev(low, high, [count, count])
    return [
        lagrange(x[i][None], low[i : i + 1], high[i : i + 1], [count, count])[0] for i in (0, 1)
    ], at


@settings(max_examples=15)
@given(
    name=st.sampled_from(_POSITIVE),
    geometry=geometries(),
    n=st.integers(1, 1500),
    derivative=st.booleans(),
    budget=st.sampled_from([1.0, 1e-3, 1e-6]),
)
def test_interpolated_products_are_within_their_bounds(
    name: str, geometry: tuple[str, int], n: int, derivative: bool, budget: float
) -> None:
    plain = KERNELS[name][0](0.3, 1.3)
    kernel: Analytic = ByScale(plain, 0) if derivative else plain
    tree = h.by_points(points(geometry[0], n, geometry[1]), 20)
    assert tree.points is not None
    x = torch.randn(n, 1, dtype=_DOUBLE)
    found, lost = product(kernel, tree, x, budget)
    exact = kernel(tree.points, tree.points) @ x
    assert bool(((found - exact).abs() <= lost + 1e-15 * n).all())
    assert float((lost * x.abs()).sum()) <= budget + 1e-7 * n


@settings(max_examples=12)
@given(name=st.sampled_from(_POSITIVE), geometry=geometries(), n=st.integers(2, 700))
def test_stored_derivatives_are_within_their_bounds(
    name: str, geometry: tuple[str, int], n: int
) -> None:
    scale, variance = _parameter([0.3, 0.5, 0.7][: geometry[1]]), _parameter(1.3)
    kernel = KERNELS[name][0](scale, variance)
    tree = h.by_points(points(geometry[0], n, geometry[1]), 16)
    operator = KernelOperator(h.from_kernel(kernel, tree, tolerance=1e-5), kernel)
    assert tree.points is not None
    assert operator.changes is not None
    assert len(operator.changes) == geometry[1] + 1
    identity = torch.eye(n, dtype=_DOUBLE)
    for change in operator.changes:
        with torch.no_grad():
            exact = change.kernel(tree.points, tree.points)
        away = operator.changed(change, identity) - exact
        assert float(away.norm()) <= change.bound + 1e-14 * n
        assert float(away.trace().abs()) <= operator.diagonal_bound


@settings(max_examples=12)
@given(
    name=st.sampled_from(_POSITIVE),
    geometry=geometries(),
    n=st.integers(1, 500),
    tolerance=st.sampled_from([1e-3, 1e-5, 1e-7]),
    noise=st.sampled_from([1e-2, 0.1, 1.0]),
)
def test_gradients_are_within_their_bounds(
    name: str, geometry: tuple[str, int], n: int, tolerance: float, noise: float
) -> None:
    x = points(geometry[0], n, geometry[1])
    generator = torch.Generator().manual_seed(1)
    y = torch.sin(4 * x.sum(1)) + 0.3 * torch.randn(n, dtype=_DOUBLE, generator=generator)
    own = _parameter([0.3, 0.2, 0.6][: geometry[1]]), _parameter(1.4), _parameter(noise)
    kernel = KERNELS[name][0](own[0], own[1])
    covariance = kernel(x, x) + own[2] * torch.eye(n, dtype=_DOUBLE)
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, y.unsqueeze(1), upper=False)
    exact = (white.square().sum() + 2 * factor.diagonal().log().sum()) / -2
    wanted = torch.autograd.grad(exact, own)
    process = h.GaussianProcess(kernel, own[2], x, tolerance=tolerance)
    found = process.gradient(y)
    process.log_likelihood(y).value.backward()
    for key, parameter, right in zip(("scale", "variance", "noise"), own, wanted, strict=True):
        bound = found[key].bound + 1e-9 * n
        assert parameter.grad is not None
        assert float((found[key].value - right).abs().max()) <= bound
        assert float((parameter.grad - right).abs().max()) <= bound
        assert math.isfinite(bound)


def test_bounds_of_gradients_follow_the_tolerance() -> None:
    x = points("uniform", 600, 2)
    y = torch.sin(4 * x.sum(1))
    scale, noise = _parameter(0.3), _parameter(0.1)
    bounds = []
    for tolerance in (1e-3, 1e-6):
        process = h.GaussianProcess(h.Matern32(scale), noise, x, tolerance=tolerance)
        found = process.gradient(y)
        assert set(found) == {"scale", "noise"}
        bounds.append(max(own.bound / float(own.value.abs()) for own in found.values()))
    assert bounds[1] < bounds[0] / 20
    assert bounds[1] < 1e-4
