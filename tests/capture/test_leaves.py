"""Leaves that forward makes, and functions of autograd that get one tensor twice: as in eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError


class Product(torch.autograd.Function):
    """Of three tensors, with gradients that are not symmetric."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c)
        return a * b * c

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        a, b, c = ctx.saved_tensors
        (tangent,) = tangents
        return tangent * b * c, tangent * 2 * a * c, tangent * 3 * a * b


def _apply(*args: Tensor) -> Tensor:
    made: Tensor = Product.apply(*args)  # type: ignore[no-untyped-call]
    return made


def _leaf(net: nn.Module, x: Tensor) -> Tensor:
    x = x[:, :4]
    x.requires_grad = True
    return net(x)


class Net(nn.Module):
    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.body = nn.Linear(4, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.net, x)


BODIES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "leaf": _leaf,
    "twice": lambda net, x: _apply(x, x, net(x)),
    "twice with a gradient": lambda net, x: (lambda h: _apply(h, h, x))(net(x)),
    "a parameter twice": lambda net, x: net(x) + _apply(net.bias, x, net.bias),  # type: ignore[arg-type]
}


def _step(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    y = net(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", BODIES)
def test_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(BODIES[name]), torch.randn(3, 4)
    expected = _step(copy.deepcopy(net), x)
    graphopt.optimize(net, backend="eager")
    for wanted, actual in zip(expected, _step(net, x), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert not x.requires_grad


def test_an_argument_of_the_user_becomes_no_leaf() -> None:
    def body(net: nn.Module, x: Tensor) -> Tensor:
        x.requires_grad = True
        return net(x)

    net, x = graphopt.optimize(Net(body), backend="eager"), torch.randn(3, 4)
    with pytest.raises(CaptureError, match="requires_grad") as caught:
        net(x)
    assert "x.requires_grad = True" in caught.value.where
    assert "outside of forward" in caught.value.hint
    assert not x.requires_grad
