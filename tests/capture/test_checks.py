"""Checks of values in forward: they hold in the graph, and where they fail eager's forward runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor, nn

from tests.support.as_graph import AsGraph, assert_same_steps
from tests.support.checking import asserts, asserts_number, asserts_tensor, raises, repairs

Body = Callable[[Tensor], Any]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.lin(x))


def negative_likelihood(x: Tensor) -> Tensor:
    """Asks that no variance is negative."""
    return torch.nn.functional.gaussian_nll_loss(x, torch.ones_like(x), 100 - x.abs())


@pytest.mark.parametrize(
    "body", [raises, asserts, asserts_tensor, asserts_number, repairs, negative_likelihood]
)
def test_checks_that_hold(body: Body) -> None:
    assert_same_steps(Model(body), [(torch.randn(3, 4),) for _ in range(3)])


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (raises, ValueError),
        (negative_likelihood, ValueError),
        (asserts, AssertionError),
        (asserts_tensor, AssertionError),
        (asserts_number, OverflowError),
        (torch.linalg.inv, torch.linalg.LinAlgError),
    ],
)
def test_check_that_fails_raises_what_eager_raises(body: Body, error: type[Exception]) -> None:
    model = Model(body)
    graph = AsGraph(model)
    good = torch.randn(4, 4)
    bad = torch.full((4, 4), 0.0 if error is torch.linalg.LinAlgError else float("nan"))
    bad = torch.full((4, 4), 1e30) if error in (ValueError, OverflowError) else bad
    graph(good)
    with pytest.raises(error) as expected:
        model(bad)
    with pytest.raises(error) as actual:
        graph(bad)
    assert str(actual.value) == str(expected.value)
    graph(good)
    assert len(graph.captures) == 1


def test_repair_runs_as_in_eager_with_its_random_numbers() -> None:
    inputs = [torch.randn(3, 4), torch.full((3, 4), float("inf")), torch.randn(3, 4)]
    plain = Model(repairs)
    graph = AsGraph(Model(repairs))
    for x in inputs:
        results = []
        for call in (plain, graph):
            torch.manual_seed(5)
            results += [call(x), torch.rand(3)]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])


@pytest.mark.parametrize(
    "body",
    [
        lambda h: D.Normal(h, h.exp()).rsample(),
        lambda h: D.kl_divergence(D.Normal(h, h.exp()), D.Normal(0.0, 1.0)),
        lambda h: D.Categorical(logits=h).entropy(),
        lambda h: h * D.Beta(1.0, 1.0).sample(),
    ],
)
def test_distributions_check_their_arguments(body: Body) -> None:
    model = Model(body)
    graph = assert_same_steps(model, [(torch.randn(3, 4),) for _ in range(2)])
    assert len(graph.captures) == 1


def test_distribution_with_a_bad_argument() -> None:
    graph = AsGraph(Model(lambda h: D.Normal(h, h.exp()).rsample()))
    graph(torch.randn(3, 4))
    with pytest.raises(ValueError, match="Expected parameter loc"):
        graph(torch.full((3, 4), float("nan")))


@pytest.mark.parametrize(
    "body",
    [
        torch.linalg.inv,
        lambda h: torch.linalg.cholesky(h @ h.t() + torch.eye(4)),
        lambda h: torch.linalg.solve(h, torch.eye(4)),
    ],
)
def test_linear_algebra(body: Body) -> None:
    assert_same_steps(Model(body), [(torch.randn(4, 4),) for _ in range(2)])
