"""How the networks are trained: affine ones to the optimum, others with the best weights kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphopt.examples.common import Best, Run
from graphopt.examples.inverse_tikhonov.data import Pairs
from graphopt.examples.inverse_tikhonov.model import Objective, TNet


@dataclass(frozen=True)
class Recipe:
    """How a network sees its data.

    Attributes:
        ridge: noise variances added before inputs are whitened; None scales them only.
        spread: the noise that is added to observations in each step, in noise deviations.
    """

    ridge: float | None
    spread: float


def relative_error(found: Tensor, u: Tensor) -> float:
    """||found - u|| / ||u||, mean over samples (samples, cells)."""
    return float(((found - u).norm(dim=1) / u.norm(dim=1)).mean())


def train_affine(run: Run, name: str, objective: Objective, data: Pairs) -> None:
    """Minimise a quadratic objective in float64 by conjugate gradients, to rounding.

    A line search on values of the loss would stop at the square root of the rounding error. The
    gradient of a quadratic is affine, so its Hessian times p is the change of the gradient along p.
    """
    parameters = list(objective.network.parameters())
    run.optimize(objective)

    @torch.no_grad()
    def gradient(x: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(x, parameters)
        with torch.enable_grad():
            value = objective(data.y, data.u)
            return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])

    def solve(_: int) -> Tensor:
        x = nn.utils.parameters_to_vector(parameters).detach()
        residual = -gradient(x)
        first = size = residual.square().sum()
        direction = residual
        for _iteration in range(100):
            if size <= 1e-28 * first:
                break
            curved = gradient(x + direction) - gradient(x)
            length = size / (direction @ curved)
            x = x + length * direction
            residual = residual - length * curved
            size, before = residual.square().sum(), size
            direction = residual + size / before * direction
        nn.utils.vector_to_parameters(x, parameters)
        return size.sqrt()

    run.loop(name, [objective], solve, 2)  # the second solves for what rounding has left


def train_network(
    run: Run,
    name: str,
    objective: Objective,
    data: Pairs,
    held_out: Pairs,
    spread: float,
    steps: int,
) -> float:
    """Adam on all data, randomised in every step; returns the validation score of the best weights.

    The score of TNet is its own functional, so that its choice needs no true parameters either; the
    median, as one observation unlike those of the training can be as large as all others together.
    The others, which have true parameters, are scored by what they are judged by.
    """
    optimizer = torch.optim.Adam(objective.network.parameters(), 5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run.optimize(objective)
    best = Best(objective.network)

    def score() -> float:
        with torch.no_grad():
            if isinstance(objective, TNet):
                return float(objective.losses(held_out.y, held_out.u).median())
            return relative_error(objective.invert(held_out.y), held_out.u)

    def step(number: int) -> Tensor:
        noise = torch.randn(data.y.shape, generator=run.generator(number), dtype=data.y.dtype)
        optimizer.zero_grad()
        value: Tensor = objective(
            data.y + spread * objective.noise * noise.to(data.y.device), data.u
        )
        value.backward()
        optimizer.step()
        scheduler.step()
        if number % 20 == 19 or number == steps - 1:
            best.offer(score())
        return value.detach()

    run.loop(name, [objective, optimizer, scheduler, best], step, steps)
    best.restore()
    return best.value
