"""Jacobian penalties: against the chain rule in numpy, and captured against double backward."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import graphopt
from graphopt.examples.common import WorkloadError
from graphopt.examples.inverse_jacobian.data import check_images, load_images, make_problem
from graphopt.examples.inverse_jacobian.gradients import double_backward
from graphopt.examples.inverse_jacobian.model import (
    JacobianPenalised,
    Route,
    inverse_network,
    squared_error,
)
from graphopt.examples.inverse_jacobian.train import case
from graphopt.model.surface import report
from tests.examples.contract import one_exact_graph

ROUTES: list[Route] = ["vjp", "jvp", "autograd"]
each_route = pytest.mark.parametrize("route", ROUTES)
Array = NDArray[np.float64]


def _small(route: Route, dtype: torch.dtype = torch.float64) -> tuple[JacobianPenalised, Tensor]:
    torch.manual_seed(0)
    network = inverse_network(3, 5, width=7).to(dtype)
    model = JacobianPenalised(network, torch.randn(3, 5, dtype=dtype), route)
    return model, torch.randn(4, 3, dtype=dtype)


def _jacobians(network: nn.Module, y: Tensor) -> list[Array]:
    """By the chain rule: a product of weights, with the rows of inactive units left out."""
    w1, b1, w2, b2, w3, _ = (p.detach().numpy() for p in network.parameters())
    found = []
    for row in y.numpy():
        first = w1 @ row + b1
        second = w2 @ np.maximum(first, 0) + b2
        found.append(w3 @ (w2 * (second > 0)[:, None]) @ (w1 * (first > 0)[:, None]))
    return found


@each_route
def test_the_penalty_is_that_of_the_chain_rule(route: Route) -> None:
    model, y = _small(route)
    probe = torch.randn(4, 5, dtype=torch.float64)
    operator = model.operator.numpy()
    expected = np.mean(
        [
            ((j @ operator @ p if route == "jvp" else (j @ operator).T @ p) ** 2).sum()
            for j, p in zip(_jacobians(model.network, y), probe.numpy(), strict=True)
        ]
    )
    x, penalty = model(y, probe)
    assert float(penalty) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(x, model.network(y))


@each_route
def test_its_gradient_is_that_of_differences(route: Route) -> None:
    model, y = _small(route)
    probe = torch.randn(4, 5, dtype=torch.float64)
    model(y, probe)[1].backward()
    for parameter in model.parameters():
        for place in range(0, parameter.numel(), 5):
            sides = []
            for step in (1e-6, -1e-6):
                parameter.data.view(-1)[place] += step
                sides.append(float(model(y, probe)[1]))
                parameter.data.view(-1)[place] -= step
            slope = 0.0 if parameter.grad is None else float(parameter.grad.view(-1)[place])
            assert slope == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-6)


@each_route
def test_the_mean_over_probes_is_the_frobenius_norm(route: Route) -> None:
    model, y = _small(route)
    exact = np.mean([np.square(j @ model.operator.numpy()).sum() for j in _jacobians(model, y)])
    torch.manual_seed(1)
    many = y.repeat(5000, 1)
    assert float(model(many, torch.randn(len(many), 5).double())[1]) == pytest.approx(
        exact, rel=0.03
    )


@each_route
def test_captured_gradients_are_those_of_double_backward(route: Route) -> None:
    model, y = _small(route, torch.float32)
    graphopt.optimize(model, backend="eager")
    probe, x = torch.randn(4, 5), torch.randn(4, 5)
    found, penalty = model(y, probe)
    (squared_error(found, x) + 0.1 * penalty).backward()
    plain = copy.deepcopy(model.network)
    expected = double_backward(plain, model.operator, y, x, probe, forward=route == "jvp")
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-5, atol=1e-6)
    (only,) = report(model).specialisations
    assert only.level == "joint"
    assert only.verification.result == "bit-equal"


def test_gradients_of_the_case_are_those_of_eager() -> None:
    one_exact_graph(case(torch.device("cpu")))


def test_a_penalised_training_ends_with_a_smaller_jacobian_and_test_error() -> None:
    problem = make_problem(load_images(), 50, torch.Generator().manual_seed(0))
    norms, errors = [], []
    for strength in (0.0, 0.01):
        torch.manual_seed(0)
        network = inverse_network(16, 64, width=64)
        model = graphopt.optimize(JacobianPenalised(network, problem.operator), backend="eager")
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(400):
            optimizer.zero_grad()
            found, penalty = model(problem.training.measured, torch.randn(50, 64))
            (squared_error(found, problem.training.images) + strength * penalty).backward()
            optimizer.step()
        with torch.no_grad():
            errors.append(squared_error(network(problem.test.measured), problem.test.images))
        norms.append(sum(np.square(j).sum() for j in _jacobians(network, problem.test.measured)))
    assert norms[1] < 0.6 * norms[0]
    assert errors[1] < 0.95 * errors[0]


def test_a_larger_training_set_holds_the_smaller_one() -> None:
    images = load_images()
    few, many = (
        make_problem(images, count, torch.Generator().manual_seed(2)) for count in (50, 100)
    )
    assert torch.equal(few.training.measured, many.training.measured[:50])
    assert torch.equal(few.test.images, many.test.images)
    assert torch.equal(few.operator, many.operator)
    residual = many.training.measured - many.training.images @ many.operator.T
    assert float(residual.std()) == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(0, 64), "empty"),
        (torch.zeros(9, 63), "shape"),
        (torch.full((9, 64), torch.nan), "NaN"),
        (torch.full((9, 64), 16.0), r"outside of \[0, 1\]"),
    ],
)
def test_other_images_are_refused(images: Tensor, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        check_images(images)


def test_too_many_training_images_are_refused() -> None:
    with pytest.raises(WorkloadError, match="take between 1 and 449"):
        make_problem(load_images(), 450, torch.Generator())
