"""The log-likelihood and its derivatives against dense factors in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.hierarchical.differentiable import log_determinant, solve
from graphopt.hierarchical.processes.system import Covariance
from tests.hierarchical.oracles import KERNELS, distances, geometries, points

_DOUBLE = torch.float64
_POSITIVE = ("exponential", "gaussian", "matern32", "matern52")


def _values(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(x), dtype=_DOUBLE, generator=generator)
    return torch.sin(4 * x.sum(1)) + 0.3 * noise


def _exact(covariance: Tensor, y: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, y.unsqueeze(1), upper=False)
    determinant = 2 * factor.diagonal().log().sum()
    return (white.square().sum() + determinant + len(y) * math.log(2 * math.pi)) / -2


def _leaves(*values: float | Sequence[float]) -> list[Tensor]:
    return [torch.tensor(value, dtype=_DOUBLE, requires_grad=True) for value in values]


@settings(max_examples=20)
@given(
    name=st.sampled_from(_POSITIVE),
    geometry=geometries(),
    n=st.integers(1, 300),
    tolerance=st.sampled_from([1e-3, 1e-5, 1e-7]),
    noise=st.sampled_from([1e-2, 0.1, 1.0]),
    scale=st.sampled_from([0.05, 0.3, 2.0]),
)
def test_the_error_is_within_the_bound_and_the_bound_within_the_tolerance(
    name: str,
    geometry: tuple[str, int],
    n: int,
    tolerance: float,
    noise: float,
    scale: float,
) -> None:
    kernel, profile = KERNELS[name]
    x = points(geometry[0], n, geometry[1])
    y = _values(x)
    covariance = profile(distances(x, x) / scale) + noise * torch.eye(n, dtype=_DOUBLE)
    found = h.GaussianProcess(kernel(scale), noise, x, tolerance=tolerance).log_likelihood(y)
    assert found.bound <= tolerance * n
    # The oracle rounds too.
    assert abs(float(found.value - _exact(covariance, y))) <= found.bound + 1e-11 * n


@pytest.mark.parametrize("name", _POSITIVE)
def test_derivatives_are_those_of_dense_matrices(name: str) -> None:
    kernel = KERNELS[name][0]
    x = points("uniform", 400, 2)
    y = _values(x).requires_grad_()
    scale, variance, noise = _leaves([0.3, 0.2], 1.4, 0.1)
    covariance = kernel(scale, variance)(x, x) + noise * torch.eye(400, dtype=_DOUBLE)
    wanted = torch.autograd.grad(_exact(covariance, y), (scale, variance, noise, y))
    process = h.GaussianProcess(kernel(scale, variance), noise, x, tolerance=1e-6)
    found = torch.autograd.grad(process.log_likelihood(y).value, (scale, variance, noise, y))
    for own, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, exact, atol=1e-3, rtol=1e-5)


def test_derivatives_are_differences() -> None:
    x = points("uniform", 300, 3)
    y = _values(x)

    def value(scale: float, noise: float) -> float:
        process = h.GaussianProcess(h.Matern52(scale), noise, x, tolerance=1e-8)
        return float(process.log_likelihood(y).value)

    scale, noise = _leaves(0.5, 0.2)
    process = h.GaussianProcess(h.Matern52(scale), noise, x, tolerance=1e-8)
    process.log_likelihood(y).value.backward()
    step = 1e-3
    assert scale.grad is not None
    assert noise.grad is not None
    by_scale = (value(0.5 + step, 0.2) - value(0.5 - step, 0.2)) / (2 * step)
    by_noise = (value(0.5, 0.2 + step) - value(0.5, 0.2 - step)) / (2 * step)
    assert float(scale.grad) == pytest.approx(by_scale, rel=1e-3)
    assert float(noise.grad) == pytest.approx(by_noise, rel=1e-3)


def test_an_optimizer_changes_hyperparameters_in_place() -> None:
    x = points("uniform", 200, 2)
    y = _values(x)
    (scale,) = _leaves(0.5)
    process = h.GaussianProcess(h.Matern32(scale), 0.1, x, tolerance=1e-5)
    optimizer = torch.optim.SGD([scale], lr=1e-4)
    first = process.log_likelihood(y)
    (-first.value).backward()
    optimizer.step()
    second = process.log_likelihood(y)
    fresh = h.GaussianProcess(h.Matern32(scale.detach()), 0.1, x, tolerance=1e-5)
    assert float(second.value.detach()) > float(first.value.detach())
    assert float(second.value.detach()) == pytest.approx(
        float(fresh.log_likelihood(y).value), abs=2 * second.bound
    )


def test_solves_and_log_determinants_are_differentiable() -> None:
    x = points("uniform", 250, 2)
    scale, noise = _leaves(0.3, 0.1)
    process = h.GaussianProcess(h.Matern32(scale), noise, x, tolerance=1e-8)
    own, order = Covariance(process.inverse(), noise), process.tree.order
    right = torch.randn(250, 2, dtype=_DOUBLE, requires_grad=True)
    weights = torch.randn(250, 2, dtype=_DOUBLE)
    covariance = h.Matern32(scale)(x[order], x[order]) + noise * torch.eye(250, dtype=_DOUBLE)
    for found, wanted in (
        (log_determinant(own), torch.logdet(covariance)),
        (
            (weights * solve(own, right)).sum(),
            (weights * torch.linalg.solve(covariance, right)).sum(),
        ),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-7)
        given = torch.autograd.grad(found, (scale, noise, right), allow_unused=True)
        exact = torch.autograd.grad(
            wanted, (scale, noise, right), allow_unused=True, retain_graph=True
        )
        for ours, theirs in zip(given, exact, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)


def test_single_precision_is_computed_in_double() -> None:
    x = points("uniform", 100, 2).float()
    y = _values(x.double()).float()
    scale = torch.tensor(0.3, requires_grad=True)
    found = h.GaussianProcess(h.Matern32(scale), 0.1, x).log_likelihood(y)
    covariance = h.Matern32(0.3)(x.double(), x.double()) + 0.1 * torch.eye(100, dtype=_DOUBLE)
    assert found.value.dtype is _DOUBLE
    exact = float(_exact(covariance, y.double()))
    assert float(found.value.detach()) == pytest.approx(exact, abs=1e-4)
    found.value.backward()
    assert scale.grad is not None
    assert scale.grad.dtype is torch.float32
