"""LARS: momentum SGD whose learning rate follows the size of each layer.

You, Gitman, Ginsburg, arXiv 1708.03888, algorithm 1. With the learning rate y of the schedule, the
trust coefficient n and the weight decay b, every parameter tensor w with gradient g is updated by

    local = n * |w| / (|g| + b * |w|)
    v <- m * v + y * local * (g + b * w)
    w <- w - v

The learning rate is within the momentum: when it changes, older steps keep theirs. `LARC` is the
form of Kurth et al., a limit on the learning rate of any optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphopt.errors import ArgumentError
from graphopt.optim.tensors import begin_step, norm_of


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling.

    A parameter whose norm, or whose gradient's, is zero, and those of a group with
    ``adaptive=False``, have a local rate of 1. `graphopt.optim.groups` makes such groups of norms
    and biases.

    Args:
        params: parameters or groups of them.
        lr: the learning rate of the schedule, above 0; a group may have 0 later.
        momentum: m, 0 to below 1.
        weight_decay: b, at least 0.
        trust: n, above 0; 0.001 in the paper.

    Raises:
        ArgumentError: a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        for name, value in (("lr", lr), ("trust", trust)):
            if not (value > 0 and math.isfinite(value)):
                raise ArgumentError(f"{name}={value} is not a positive number", hint="use 0.001")
        if not (0 <= momentum < 1 and weight_decay >= 0):
            raise ArgumentError(
                f"momentum={momentum}, weight_decay={weight_decay} are out of range",
                hint="pass 0 <= momentum < 1 and weight_decay >= 0",
            )
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**numbers, "adaptive": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the gradients and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ArgumentError: a gradient is sparse.
        """
        loss = begin_step(self.param_groups, closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, decay = self.state[weight], group["weight_decay"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        rate: Any = group["lr"]
        if group["adaptive"]:
            rate = rate * _local(weight, gradient, decay, group["trust"])
        velocity = state["momentum_buffer"].mul_(group["momentum"])
        velocity.add_((gradient + decay * weight) * rate)
        weight.sub_(velocity)


def _local(weight: Tensor, gradient: Tensor, decay: float, trust: float) -> Tensor:
    size, slope = norm_of(weight), norm_of(gradient)
    local = trust * size / (slope + decay * size)
    return torch.where((size > 0) & (slope > 0), local, 1.0)
