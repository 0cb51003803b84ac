"""Several backwards at once, by vmap over tangents, as `torch.autograd` offers them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError


class Two(nn.Module):
    """Two outputs, with much that the eager engine writes in place in its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        h = self.norm(h + torch.sigmoid(h)) * h.exp()
        return self.second(nn.functional.gelu(h)), self.other(x).relu()


def _pair() -> list[Any]:
    torch.manual_seed(0)
    model = Two()
    return [model, graphopt.optimize(copy.deepcopy(model), backend="eager")]


def _input() -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()


def _equal(expected: object, found: object) -> None:
    assert isinstance(expected, tuple)
    assert isinstance(found, tuple)
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warm", [False, True])
def test_gradients_of_several_tangents(warm: bool) -> None:
    results = []
    if warm:  # the step of an earlier process
        _pair()[1](_input())
    for model in _pair():
        x = _input()
        one, two = model(x)
        of = [x, *model.parameters()]
        tangents = torch.eye(9).view(9, 3, 3), torch.linspace(-1, 1, 54).view(9, 3, 2)
        both = torch.autograd.grad(
            (one, two), of, tangents, retain_graph=True, is_grads_batched=True
        )
        some = torch.autograd.grad(one, of, tangents[0], is_grads_batched=True, allow_unused=True)
        results.append((*both, *some))
    _equal(*results)


def test_a_jacobian_at_once_is_the_one_row_by_row() -> None:
    plain, optimized = _pair()
    jacobian: Any = torch.autograd.functional.jacobian
    expected = jacobian(plain, _input())
    _equal(expected, jacobian(optimized, _input(), vectorize=True))
    _equal(expected, jacobian(optimized, _input()))


def test_vmap_within_vmap() -> None:
    results = []
    for model in _pair():
        x = _input()
        one, _ = model(x)

        def grad(row: Tensor) -> Tensor:
            return torch.autograd.grad(one, x, row, retain_graph=True)[0]  # noqa: B023

        rows = torch.linspace(-1, 1, 54).view(3, 2, 3, 3)
        results.append((torch.vmap(torch.vmap(grad, in_dims=1), in_dims=1)(rows),))
    _equal(*results)


@pytest.mark.slow
def test_with_inductor() -> None:
    plain, _ = _pair()
    optimized = graphopt.optimize(copy.deepcopy(plain), backend="inductor")
    jacobian: Any = torch.autograd.functional.jacobian
    _equal(jacobian(plain, _input()), jacobian(optimized, _input(), vectorize=True))


def test_methods_refuse_what_is_no_step() -> None:
    model = _pair()[0]
    graphopt.optimize(model, passes="cleanup,kfac", backend="eager")
    one, _ = model(_input())
    message = re.escape(
        "[GO-A01] several tangents at once (is_grads_batched, jacobian with vectorize) make no "
        "step, and kfac has to see steps\n  try: optimize the model that you differentiate so with "
        "passes='cleanup'"
    )
    with pytest.raises(ArgumentError, match=message):
        torch.autograd.grad(
            one, model.first.weight, torch.eye(9).view(9, 3, 3), is_grads_batched=True
        )
