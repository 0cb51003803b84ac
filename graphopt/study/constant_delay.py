"""Training in which every gradient is applied D updates after it was computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphopt.errors import ArgumentError, StateError
from graphopt.optim import DelayedSGD


class ConstantDelay:
    """Steps of an optimizer with gradients from D steps ago.

    The gradient of step t is computed at the weights of step t, forward and backward, or at those
    that a `DelayedSGD` with a prediction predicts then; it is applied at the end of step t + D. The
    first D steps apply nothing. The gradients under way need D times the memory of the parameters.

    Args:
        optimizer: any; its parameters that are trainable are delayed. A `DelayedSGD` must have the
            same ``delay`` in all groups; factors and horizons for another one can be given to it.
        delay: D, in steps, at least 0.

    Raises:
        ArgumentError: the delay is negative, or not that of the optimizer.
    """

    def __init__(self, optimizer: Optimizer, delay: int) -> None:
        if delay < 0:
            raise ArgumentError(f"delay={delay} is negative", hint="use 0 for no delay")
        check_delay(optimizer, delay, None)
        self.optimizer = optimizer
        self.delay = delay
        self._waiting: deque[list[Tensor | None]] = deque()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Compute a gradient, and apply the one that is due.

        Args:
            closure: runs the model and returns the loss, one element; it leaves `backward` and
                ``zero_grad`` to this function.

        Returns:
            The loss, without a graph.
        """
        if isinstance(self.optimizer, DelayedSGD):
            with self.optimizer.predicted():
                loss = self._backward(closure)
        else:
            loss = self._backward(closure)
        self._waiting.append([parameter.grad for parameter in self._parameters()])
        if len(self._waiting) > self.delay:
            self._apply()
        return loss

    def drain(self) -> None:
        """Apply the gradients under way."""
        while self._waiting:
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Copies of the gradients under way, beside the state of the optimizer."""
        waiting = [[g if g is None else g.clone() for g in due] for due in self._waiting]
        return {"optimizer": self.optimizer.state_dict(), "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved.

        Raises:
            StateError: it has more gradients under way than the delay, or for other parameters.
        """
        parameters = self._parameters()
        shapes = [p.shape for p in parameters]
        waiting: list[list[Tensor | None]] = state["waiting"]
        for due in waiting:
            fit = len(due) == len(shapes) and all(
                g is None or g.shape == shape for g, shape in zip(due, shapes, strict=True)
            )
            if not fit or len(waiting) > self.delay:
                raise StateError(
                    f"{len(waiting)} saved gradients of {len(due)} parameters do not fit a delay "
                    f"of {self.delay} and {len(shapes)} parameters",
                    hint="load the state into a training of the same model and delay",
                )
        self.optimizer.load_state_dict(state["optimizer"])
        self._waiting = deque(
            [
                g if g is None else g.to(p.device, copy=True)
                for g, p in zip(due, parameters, strict=True)
            ]
            for due in waiting
        )

    def _parameters(self) -> list[Tensor]:
        return [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def _backward(self, closure: Callable[[], Tensor]) -> Tensor:
        for parameter in self._parameters():
            parameter.grad = None
        with torch.enable_grad():
            loss = closure()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _apply(self) -> None:
        due = self._waiting.popleft()
        for parameter, gradient in zip(self._parameters(), due, strict=True):
            parameter.grad = gradient
        self.optimizer.step()


def check_delay(optimizer: Optimizer, delay: int, parameters: Sequence[Tensor] | None) -> None:
    """Refuse a `DelayedSGD` that was told another delay than the one it gets.

    Args:
        optimizer: others are not checked.
        delay: in updates.
        parameters: which of the optimizer's; ``None`` for all.

    Raises:
        ArgumentError: a group has another delay.
    """
    if not isinstance(optimizer, DelayedSGD):
        return
    chosen = None if parameters is None else set(parameters)
    for index, group in enumerate(optimizer.param_groups):
        if group["delay"] != delay and (chosen is None or chosen & set(group["params"])):
            raise ArgumentError(
                f"the optimizer expects a delay of {group['delay']} where it is {delay}",
                where=f"parameter group {index}",
                hint=f"give the group delay={delay}; its compensation and horizon may differ",
            )
