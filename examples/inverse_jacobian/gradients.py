"""Gradients through compiled steps against the double backward of plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.examples.common import Run
from graphopt.examples.inverse_jacobian.model import (
    JacobianPenalised,
    Route,
    inverse_network,
    squared_error,
)


def largest_difference(run: Run) -> dict[str, float]:
    """Per way of taking the derivative: largest difference over largest element, of all weights."""
    found: dict[str, float] = {}
    generator = run.generator(77)
    operator = torch.randn(16, 64, generator=generator) / 4
    y = torch.randn(32, 16, generator=generator).to(run.device)
    x = torch.rand(32, 64, generator=generator).to(run.device)
    probe = torch.randn(32, 64, generator=generator).to(run.device)
    routes: tuple[Route, ...] = ("vjp", "jvp", "autograd")
    for route in routes:
        torch.manual_seed(run.seed)
        network = inverse_network(16, 64)
        model = run.optimize(JacobianPenalised(network, operator, route))
        reconstruction, penalty = model(y, probe)
        loss = squared_error(reconstruction, x) + 0.1 * penalty
        loss.backward()
        ours = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        network.zero_grad()
        operator = operator.to(run.device)
        theirs = double_backward(network, operator, y, x, probe, forward=route == "jvp")
        scale = max(float(g.abs().max()) for g in theirs)
        pairs = zip(ours, theirs, strict=True)
        found[route] = max(float((a - b).abs().max()) for a, b in pairs) / scale
    return found


def double_backward(
    network: nn.Module, operator: Tensor, y: Tensor, x: Tensor, probe: Tensor, *, forward: bool
) -> list[Tensor]:
    """Gradients of error plus 0.1 of the penalty, by `torch.autograd.grad` and nothing else.

    Forward mode is had from reverse mode by differentiating the pulled-back u twice: J w is the
    derivative of ⟨Jᵀu, w⟩ with respect to u.
    """
    y = y.clone().requires_grad_()
    output = network(y)
    if forward:
        u = torch.zeros_like(output, requires_grad=True)
        (pulled,) = torch.autograd.grad(output, y, u, create_graph=True)
        pushed = (pulled * (probe @ operator.T)).sum()
        (change,) = torch.autograd.grad(pushed, u, create_graph=True)
    else:
        (pulled,) = torch.autograd.grad(output, y, probe, create_graph=True)
        change = pulled @ operator
    loss = (output - x).square().sum(1).mean() + 0.1 * change.square().sum(1).mean()
    return list(torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True))
