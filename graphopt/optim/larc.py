"""LARC: layer-wise adaptive rate control.

A layer whose gradient is large against its weights limits the learning rate of all layers. LARC
gives every parameter tensor w with gradient g a rate of its own (You et al., arXiv 1708.03888, call
it LARS without the limit):

    local = trust * |w| / (|g| + weight_decay * |w|),   rate = min(local, lr)

Kurth et al., SC18, trained on 27,360 GPUs with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from graphopt.errors import ArgumentError
from graphopt.optim.tensors import begin_step, norm_of

Group = dict[str, Any]


class LARC(Optimizer):
    """Any optimizer, with a learning rate per parameter tensor that its gradient cannot exceed.

    Before each step of `optimizer`, every gradient and its weight decay are multiplied by
    ``rate / lr``, in ``p.grad`` itself. Where the optimizer is linear in the gradient, as SGD is,
    this is a learning rate of ``rate``. Adam divides by the size of recent gradients, so that a
    constant factor cancels: there LARC only acts on what changes, as a clipping of outliers.

    Groups, state and ``state_dict`` are those of `optimizer`, which can be scheduled through either
    of the two. A tensor whose norm, or whose gradient's, is zero keeps the learning rate of its
    group, and so do those of a group with ``adaptive=False``: `graphopt.optim.groups` makes such
    groups of norms and biases. Weight decay that a group decouples from the gradient (AdamW) is
    left to the optimizer.

    Args:
        optimizer: makes the steps.
        trust: largest ratio of the norms of a step of SGD and of the weights, above 0; 0.002 in the
            code of Kurth et al.
        clip: limit the local rate by that of the group; without it, the local rate is taken, as
            LARS does within its schedule (`LARS` is its published form).

    Raises:
        ArgumentError: `trust` is not a positive number.
    """

    def __init__(self, optimizer: Optimizer, trust: float = 0.002, *, clip: bool = True) -> None:
        if not (trust > 0 and math.isfinite(trust)):
            raise ArgumentError(f"trust={trust} is not a positive number", hint="use 0.002")
        self.optimizer = optimizer
        self.trust = trust
        self.clip = clip
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LARC, clip=self.clip), (self.optimizer, self.trust)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Scale the gradients, and let the optimizer make its step.

        Args:
            closure: computes the gradients and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ArgumentError: a gradient is sparse.
        """
        loss = begin_step(self.param_groups, closure)
        for group in self.param_groups:
            if group.get("adaptive", True):
                self._scale(group)
        self.optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer, whether LARC was around it or not."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        self.defaults = self.optimizer.defaults
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state

    def _scale(self, group: Group) -> None:
        decay = 0.0 if group.get("decoupled_weight_decay") else group.get("weight_decay", 0.0)
        sign = -1.0 if group.get("maximize") else 1.0
        for weight in group["params"]:
            gradient = weight.grad
            if gradient is None:
                continue
            size, slope = norm_of(weight), norm_of(gradient)
            factor = self.trust * size / (slope + decay * size) / group["lr"]
            if self.clip:
                factor = factor.clamp(max=1.0)
            factor = torch.where((size > 0) & (slope > 0) & (group["lr"] > 0), factor, 1.0)
            gradient.mul_(factor)
            if decay:
                # The optimizer adds decay * w; with this it sees factor * (g + decay * w).
                gradient.add_(weight * (sign * decay * (factor - 1)))
