"""RMSprop that turns into SGD with momentum: how ResNet-50 was trained with batches of 32,768.

At a learning rate that suits a large batch, the first steps of SGD diverge; those of RMSprop have a
size of their own. Akiba et al., arXiv 1711.04325, begin with one and move over to the other:

    m'     = mu2 m + (1 - mu2) g^2
    Delta' = mu1 Delta - (a_SGD + a_RMS / (sqrt(m') + eps)) g
    theta' = theta + eta Delta'

with ``a_RMS = (1 - a_SGD) eta_RMS / eta``: where a_SGD is 0, this is RMSprop with momentum and the
learning rate eta_RMS, whatever eta is. `sgd_share` is a_SGD by the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from graphopt.errors import ArgumentError
from graphopt.optim.tensors import begin_step

Group = dict[str, Any]


def sgd_share(epoch: float, *, center: float = 10.0, period: float = 5.0) -> float:
    """a_SGD, the weight of SGD at `epoch`: from near 0 to 1.

    With the center c and the period p it is ``exp(2 (epoch - c) / p) / 2`` before c,
    ``1/2 + (epoch - c) / p`` from there to ``c + p/2``, and 1 afterwards. Value and slope of the
    first two agree at c, where the slope is 1/p, and the value of the last two at ``c + p/2``. A
    straight part with twice that slope, as one can find it in print and in code, would jump from
    3/2 to 1.

    Args:
        epoch: epochs done so far, with a fraction, at least 0.
        center: epoch at which half of the weight is SGD's, at least 0.
        period: twice the length of the straight part, in epochs, above 0.

    Raises:
        ArgumentError: a number is out of range.
    """
    _check(epoch >= 0, f"epoch={epoch} is negative", "count epochs from 0")
    _check_transition(center, period)
    if epoch < center:
        return 0.5 * math.exp(2.0 * (epoch - center) / period)
    return min(0.5 + (epoch - center) / period, 1.0)


class RMSpropWarmup(Optimizer):
    """RMSprop that turns into SGD with momentum, in a few fused operators for all parameters.

    Each call of `step` is one optimizer step, and ``steps_per_epoch`` of them are an epoch. Once
    the transition is over, steps are those of `torch.optim.SGD` with ``foreach=True`` to the last
    bit, and the mean squares are given free. Learning-rate schedulers work as with any optimizer;
    they do not change ``rms_lr``, but a learning rate of 0 lets parameters rest. All arguments may
    differ between groups. Parameters whose ``grad`` is ``None`` are left alone.

    Args:
        params: parameters or groups of them.
        lr: eta, the learning rate of SGD, at least 0.
        steps_per_epoch: optimizer steps in an epoch, above 0; need not be whole.
        rms_lr: eta_RMS, the learning rate of RMSprop, at least 0.
        momentum: mu1, 0 to below 1.
        decay: mu2, of the mean squares, 0 to below 1. They begin at 0 and are not corrected for it,
            so the first steps are up to ``1 / sqrt(1 - mu2)`` times as long.
        eps: added to the root of the mean squares, above 0.
        center: see `sgd_share`; in epochs.
        period: see `sgd_share`; in epochs.
        weight_decay: added to the gradient as ``weight_decay * w``, at least 0.

    Raises:
        ArgumentError: an argument is out of range, or a parameter is not real.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        steps_per_epoch: float,
        rms_lr: float = 3e-4,
        momentum: float = 0.9,
        decay: float = 0.99,
        eps: float = 1e-8,
        center: float = 10.0,
        period: float = 5.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "steps_per_epoch": steps_per_epoch,
            "rms_lr": rms_lr,
            "momentum": momentum,
            "decay": decay,
            "eps": eps,
            "center": center,
            "period": period,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, at the step where the others are.

        Raises:
            ArgumentError: see the class.
        """
        where = f"parameter group {len(self.param_groups)}"
        _check_group({**self.defaults, **param_group}, where)
        taken = self.param_groups[0]["steps"] if self.param_groups else 0
        super().add_param_group({"steps": taken, **param_group})
        kinds = [p.dtype for p in self.param_groups[-1]["params"] if not p.is_floating_point()]
        if kinds:
            self.param_groups.pop()
            raise ArgumentError(
                f"a parameter of {kinds[0]} cannot be updated",
                where=where,
                hint="pass real floating-point parameters",
            )

    @property
    def share(self) -> float:
        """a_SGD of the step to come, of the first group."""
        return _share(self.param_groups[0])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the parameters that have a ``grad``.

        Args:
            closure: computes the loss and the gradients, before the update.

        Returns:
            What the closure returned.

        Raises:
            ArgumentError: a gradient is sparse; nothing has changed then.
        """
        loss: float | None = begin_step(self.param_groups, closure)
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(group, parameters)
            group["steps"] += 1
        return loss

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        share, rate = _share(group), float(group["lr"])
        if share < 1.0:
            squares = self._buffers(parameters, "square_average")
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - group["decay"])
            scale = torch._foreach_sqrt(squares)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_reciprocal_(scale)
            torch._foreach_mul_(scale, (1.0 - share) * group["rms_lr"] / rate if rate else 0.0)
            torch._foreach_add_(scale, share)
            torch._foreach_mul_(scale, gradients)
            gradients = list(scale)
        else:
            for p in parameters:
                self.state[p].pop("square_average", None)
        # The buffer is -Delta, as in `torch.optim.SGD`.
        buffers = self._buffers(parameters, "momentum_buffer")
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(parameters, buffers, alpha=-rate)

    def _buffers(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """A state of these parameters, zeros where it is new."""
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [state[name] for state in states]


def _share(group: Group) -> float:
    epoch = group["steps"] / group["steps_per_epoch"]
    return sgd_share(epoch, center=group["center"], period=group["period"])


def _check_transition(center: float, period: float, where: str = "") -> None:
    _check(
        0 <= center < math.inf,
        f"center={center} is no epoch",
        "pass an epoch of at least 0, such as 10",
        where,
    )
    _check(
        0 < period < math.inf, f"period={period} is not positive", "pass epochs, such as 5", where
    )


def _check_group(group: Group, where: str) -> None:
    for name in ("lr", "rms_lr", "weight_decay"):
        value = float(group[name])
        _check(
            0 <= value < math.inf,
            f"{name}={value} is negative or not finite",
            "pass 0 or more",
            where,
        )
    for name in ("momentum", "decay"):
        value = float(group[name])
        _check(0 <= value < 1, f"{name}={value} is not in [0, 1)", "use 0.9 to 0.99", where)
    _check(0 < group["eps"] < math.inf, f"eps={group['eps']} is not positive", "use 1e-8", where)
    steps = group["steps_per_epoch"]
    _check(
        0 < steps < math.inf,
        f"steps_per_epoch={steps} is not positive",
        "pass the number of optimizer steps in one pass over the data",
        where,
    )
    _check_transition(group["center"], group["period"], where)


def _check(holds: bool, message: str, hint: str, where: str = "") -> None:
    if not holds:
        raise ArgumentError(message, where=where, hint=hint)
