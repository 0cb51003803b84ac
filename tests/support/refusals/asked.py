"""Gradients that the caller asks for, and that a captured step lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import DoubleBackwardError, IntermediateGradientError
from tests.support.refusals.example import Example, Refusal, Small, Way, results, small


def penalty(model: nn.Module) -> object:
    x = torch.randn(3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    return model.lin.weight.grad


class Slope(Small):
    """The gradient that a penalty is about, as the output of forward."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return torch.func.grad(lambda v: self.body(self, self.lin(v)).sum())(x)


def penalty_of_output(model: nn.Module) -> object:
    model(torch.randn(3, 4)).square().sum().backward()
    return model.lin.weight.grad


TWICE = Refusal(
    "twice",
    "`backward` or `autograd.grad` with `create_graph=True` (double backward)",
    "the backward half of a graph has no backward",
    "`torch.func.grad` inside of forward",
    (
        Example(
            "penalty",
            small(lambda s, h: h.tanh()),
            "create_graph=True",
            hint="second derivatives",
            step=penalty,
            error=DoubleBackwardError,
            plain=False,
            way=Way(lambda: Slope(lambda s, h: h.tanh()), penalty_of_output),
        ),
    ),
)


def _both(s: Small, h: Tensor) -> tuple[Tensor, Tensor]:
    h = h.relu()
    return h.sum(1), h


def cam_retained(model: nn.Module) -> object:
    y, h = model(torch.randn(3, 4))
    h.retain_grad()
    y.sum().backward()
    return h.grad


def cam_hooked(model: nn.Module) -> object:
    y, h = model(torch.randn(3, 4))
    h.register_hook(lambda gradient: gradient * 2)
    y.sum().backward()
    return results(model)


def cam_grad(model: nn.Module) -> object:
    y, h = model(torch.randn(3, 4))
    return torch.autograd.grad(y.sum(), h)[0]


def cam_zeros(model: nn.Module) -> object:
    zeros = torch.zeros(3, 4, requires_grad=True)
    model(torch.randn(3, 4), zeros)[0].sum().backward()
    return zeros.grad


def _with_added(s: Small, h: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    h = h.relu() + zeros
    return h.sum(1), h


_CAM = Way(small(_with_added), cam_zeros)

INTERMEDIATE = Refusal(
    "intermediate",
    "`retain_grad`, `register_hook` or `autograd.grad` on an output from which another output is "
    "computed",
    "that gradient is inside of the graph (`autograd.grad` raises PyTorch's own error, or gives "
    "`None` with `allow_unused=True`)",
    "add zeros that require a gradient to the value in forward: their gradient is its",
    (
        Example(
            "retain_grad",
            small(_both),
            "^.GO-R03. retain_grad",
            hint="^add zeros",
            step=cam_retained,
            error=IntermediateGradientError,
            plain=False,
            way=_CAM,
        ),
        Example(
            "register_hook",
            small(_both),
            "register_hook",
            hint="^add zeros",
            step=cam_hooked,
            error=IntermediateGradientError,
            plain=False,
        ),
        Example(
            "grad",
            small(_both),
            "not have been used in the graph",
            step=cam_grad,
            error=RuntimeError,
            plain=False,
            way=_CAM,
        ),
    ),
)

ALL = (TWICE, INTERMEDIATE)
