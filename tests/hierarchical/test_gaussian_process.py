"""Predictions, and what cannot be used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.errors import ArgumentError, GraphoptError, IndefiniteError
from tests.hierarchical.oracles import KERNELS, distances, geometries, points

_DOUBLE = torch.float64


def _process(n: int = 50, noise: float = 0.1, **options: float) -> h.GaussianProcess:
    return h.GaussianProcess(h.Matern32(0.3), noise, points("uniform", n, 2), **options)


@settings(max_examples=15)
@given(
    name=st.sampled_from(["exponential", "gaussian", "matern32", "matern52"]),
    geometry=geometries(),
    n=st.integers(1, 300),
    tolerance=st.sampled_from([1e-4, 1e-7]),
)
def test_predictions_are_within_their_bounds(
    name: str, geometry: tuple[str, int], n: int, tolerance: float
) -> None:
    kernel, profile = KERNELS[name]
    x = points(geometry[0], n, geometry[1])
    new = points(geometry[0], 20, geometry[1], seed=1)
    y = torch.cos(3 * x.sum(1))
    covariance = profile(distances(x, x) / 0.3) + 0.05 * torch.eye(n, dtype=_DOUBLE)
    across = profile(distances(x, new) / 0.3)
    mean = across.T @ torch.linalg.solve(covariance, y)
    variance = 1 - (across * torch.linalg.solve(covariance, across)).sum(0)
    found = h.GaussianProcess(kernel(0.3), 0.05, x, tolerance=tolerance).predict(y, new)
    assert bool(((found.mean - mean).abs() <= found.mean_bound + 1e-11).all())
    assert bool(((found.variance - variance).abs() <= found.variance_bound + 1e-11).all())
    assert float(found.mean_bound.max()) < 0.1
    assert float(found.variance_bound.max()) < 0.01


def test_what_a_process_has_seen_it_predicts() -> None:
    x = points("uniform", 80, 2)
    y = torch.sin(5 * x[:, 0])
    found = h.GaussianProcess(h.Matern52(0.5), 1e-4, x).predict(y, x)
    torch.testing.assert_close(found.mean, y, atol=0.02, rtol=0)
    assert float(found.variance.max()) < 2e-4


def test_far_away_nothing_is_known() -> None:
    process = _process()
    found = process.predict(torch.ones(50), torch.full((1, 2), 100.0))
    assert float(found.mean) == pytest.approx(0, abs=1e-9)
    assert float(found.variance) == pytest.approx(1, abs=1e-9)


def test_no_new_points() -> None:
    found = _process().predict(torch.ones(50), torch.empty(0, 2))
    assert found.mean.shape == found.variance_bound.shape == (0,)


def test_one_coordinate_may_be_a_vector() -> None:
    x = points("uniform", 70, 1)
    y = torch.sin(x[:, 0])
    flat, column = (h.GaussianProcess(h.Matern32(0.3), 0.1, own) for own in (x[:, 0], x))
    assert float(flat.log_likelihood(y).value) == float(column.log_likelihood(y).value)
    assert torch.equal(flat.predict(y, x[:5, 0]).mean, column.predict(y, x[:5]).mean)


def test_points_may_coincide_where_there_is_noise() -> None:
    x = points("uniform", 40, 2).repeat(2, 1)
    found = h.GaussianProcess(h.Matern32(0.3), 0.1, x).log_likelihood(torch.ones(80))
    covariance = h.Matern32(0.3)(x, x) + 0.1 * torch.eye(80, dtype=_DOUBLE)
    exact = torch.distributions.MultivariateNormal(torch.zeros(80, dtype=_DOUBLE), covariance)
    assert abs(float(found.value - exact.log_prob(torch.ones(80).double()))) <= found.bound + 1e-9


def test_no_noise_needs_points_that_differ() -> None:
    x = torch.linspace(0, 1, 60, dtype=_DOUBLE)
    y = torch.sin(6 * x)
    found = h.GaussianProcess(h.Exponential(0.2), 0.0, x, tolerance=1e-4).log_likelihood(y)
    covariance = h.Exponential(0.2)(x.unsqueeze(1), x.unsqueeze(1))
    exact = torch.distributions.MultivariateNormal(torch.zeros(60, dtype=_DOUBLE), covariance)
    assert abs(float(found.value - exact.log_prob(y))) <= found.bound + 1e-9
    with pytest.raises(IndefiniteError, match="try: "):
        h.GaussianProcess(h.Exponential(0.2), 0.0, x.repeat(2)).log_likelihood(y.repeat(2))


def test_a_nugget_is_added_where_it_is_needed() -> None:
    x = torch.linspace(0, 1, 60, dtype=_DOUBLE).repeat(2)
    y = torch.sin(6 * x)
    process = h.GaussianProcess(h.Exponential(0.2), 0.0, x, tolerance=1e-3, nugget=1e-4)
    with pytest.warns(UserWarning, match="was added to its noise"):
        found = process.log_likelihood(y)
    added = process.inverse().shift
    assert added >= 1e-4
    covariance = h.Exponential(0.2)(x.unsqueeze(1), x.unsqueeze(1))
    covariance = covariance + added * torch.eye(120, dtype=_DOUBLE)
    exact = torch.distributions.MultivariateNormal(torch.zeros(120, dtype=_DOUBLE), covariance)
    assert abs(float(found.value - exact.log_prob(y))) <= found.bound + 1e-9


def _refused() -> dict[str, tuple[Callable[[], object], str]]:
    ones, bad = torch.ones(50), torch.ones(50)
    bad[7] = float("nan")
    return {
        "values of another length": (
            lambda: _process().log_likelihood(torch.ones(49)),
            "50 points",
        ),
        "values in columns": (lambda: _process().log_likelihood(ones.unsqueeze(1)), "50 points"),
        "value nan": (lambda: _process().log_likelihood(bad), "value 7 is not finite"),
        "negative noise": (lambda: _process(noise=-0.1), "noise of -0.1"),
        "nan noise": (lambda: _process(noise=float("nan")), "noise of nan"),
        "negative scale": (lambda: h.Matern32(-1.0), "scale"),
        "negative nugget": (lambda: _process(nugget=-1.0), "nugget=-1.0"),
        "derivatives of an unknown kernel": (
            lambda: h.GaussianProcess(
                h.InverseDistance(torch.ones(()).double().requires_grad_(), at_zero=1e4),
                1.0,
                points("uniform", 50, 2),
            ).gradient(ones),
            "closed form",
        ),
        "no tolerance": (lambda: _process(tolerance=0.0), "tolerance of 0.0"),
        "tolerance out of reach": (
            lambda: _process(300, tolerance=1e-16).log_likelihood(torch.ones(300)),
            "out of reach",
        ),
        "negative variance": (
            lambda: h.GaussianProcess(
                h.Matern32(0.3, -1.0), 0.1, points("uniform", 50, 2)
            ).log_likelihood(ones),
            "not positive definite",
        ),
        "new points of another space": (
            lambda: _process().predict(ones, torch.ones(3, 3)),
            r"\(3, 3\)",
        ),
        "new point nan": (
            lambda: _process().predict(ones, torch.full((1, 2), torch.nan)),
            "finite",
        ),
    }


@pytest.mark.parametrize("name", _refused())
def test_what_is_refused(name: str) -> None:
    call, message = _refused()[name]
    with pytest.raises(GraphoptError, match=message) as caught:
        call()
    assert caught.value.hint
    assert isinstance(caught.value, ArgumentError | IndefiniteError)


def test_a_line_in_space() -> None:
    line: Tensor = torch.rand(150, 1, dtype=_DOUBLE) * torch.tensor([1.0, 2.0, 3.0])
    found = h.GaussianProcess(h.Matern32(0.5), 0.1, line).log_likelihood(torch.ones(150))
    covariance = h.Matern32(0.5)(line, line) + 0.1 * torch.eye(150, dtype=_DOUBLE)
    exact = torch.distributions.MultivariateNormal(torch.zeros(150, dtype=_DOUBLE), covariance)
    assert abs(float(found.value - exact.log_prob(torch.ones(150).double()))) <= found.bound + 1e-9
