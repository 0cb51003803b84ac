"""SP-NGD's learning rate, and a momentum that follows it.

Osawa et al., arXiv 2002.06015, section on the training scheme. With the factor
``f(e) = 1`` up to `start`, ``(1 - (e - start) / (end - start)) ** power`` up to `end`, and 0 after
it, the learning rate is ``eta0 * f``. The momentum m that goes with it multiplies the last
*update*: ``w += v`` with ``v = m * v - eta * gradient``. `torch.optim.SGD` instead sums *gradients*
and multiplies the sum by eta, so the same training needs another number there:
``m * eta_{t-1} / eta_t``. `PolynomialDecay` knows both conventions.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graphopt.errors import ArgumentError


def polynomial_decay(epoch: float, *, start: float, end: float, power: float) -> float:
    """The factor of the learning rate at `epoch`, from 1 down to 0.

    Args:
        epoch: epochs done so far, with a fraction.
        start: epoch up to which the factor is 1.
        end: epoch from which on it is 0, later than `start`.
        power: exponent of the decay, above 0; 1 is a straight line.

    Raises:
        ArgumentError: `end` is not later than `start`, `start` is negative, or `power` is not
            positive.
    """
    if not 0 <= start < end:
        raise ArgumentError(
            f"a decay from epoch {start} to epoch {end} is impossible",
            hint="pass 0 <= start < end, in epochs",
        )
    if not power > 0:
        raise ArgumentError(f"power={power} is not positive", hint="use 1 for a linear decay")
    if epoch <= start:
        return 1.0
    if epoch >= end:
        return 0.0
    # Rounding is monotone, so the quotient is at most 1 and the base never negative.
    return float((1.0 - (epoch - start) / (end - start)) ** power)


class PolynomialDecay(LRScheduler):
    """Sets the learning rate of `polynomial_decay`, and a momentum tied to it, once a step.

    Call `step` after every `optimizer.step()`, not once an epoch; `last_epoch` counts those calls,
    as in every PyTorch scheduler. Resume as usual: build optimizer and scheduler, then load the
    states of both.

    Momentum, with m0 the one the optimizer was made with and eta_t the learning rate of step t:

    * ``"proportional"``, the paper: ``m = (m0 / eta0) * eta_t``;
    * ``"ratio"``, the code: ``m = m0 * eta_t / eta_{t-1}``, so m0 while eta is constant;
    * ``None``: the momentum is left alone, and the optimizer need not have one.

    With ``buffer="gradients"`` the value set is ``m * eta_{t-1} / eta_t``, with which
    `torch.optim.SGD` (without dampening and Nesterov) makes the updates that the formulas mean.
    "ratio" is then a constant m0: SGD's own convention already does what that formula is for.

    Args:
        optimizer: what to schedule; each group decays from its own learning rate and momentum.
        start: epoch at which the decay begins, at least 0.
        end: epoch at which the learning rate reaches 0.
        power: exponent of the decay, above 0.
        steps_per_epoch: optimizer steps in an epoch, above 0; need not be whole.
        momentum: how the momentum follows the learning rate.
        buffer: what the optimizer's momentum buffer sums: ``"updates"`` (the learning rate is
            inside) or ``"gradients"`` (it is applied afterwards, as in `torch.optim.SGD`).
        last_epoch: number of the last step of a run that is resumed without `load_state_dict`.

    Raises:
        ArgumentError: a number is out of range, a choice is unknown, or a parameter group has no
            momentum to tie.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        start: float,
        end: float,
        power: float,
        steps_per_epoch: float,
        momentum: Literal["proportional", "ratio"] | None = "proportional",
        buffer: Literal["updates", "gradients"] = "updates",
        last_epoch: int = -1,
    ) -> None:
        polynomial_decay(0.0, start=start, end=end, power=power)  # refuses what is out of range
        if not steps_per_epoch > 0:
            raise ArgumentError(
                f"steps_per_epoch={steps_per_epoch} is not positive",
                hint="pass the number of optimizer steps in one pass over the data",
            )
        if momentum not in ("proportional", "ratio", None) or buffer not in (
            "updates",
            "gradients",
        ):
            raise ArgumentError(
                f"momentum={momentum!r} with buffer={buffer!r} is unknown",
                hint="momentum is 'proportional', 'ratio' or None; buffer 'updates' or 'gradients'",
            )
        self.start, self.end, self.power = start, end, power
        self.steps_per_epoch = steps_per_epoch
        self.momentum = momentum
        self.buffer = buffer
        self.base_momentums: list[float] = []
        if momentum is not None:
            for index, group in enumerate(optimizer.param_groups):
                if "momentum" not in group:
                    raise ArgumentError(
                        f"{type(optimizer).__name__} has no momentum to tie to its learning rate",
                        where=f"parameter group {index}",
                        hint="pass momentum=None",
                    )
                self.base_momentums.append(group.setdefault("initial_momentum", group["momentum"]))
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The learning rate of this step over the initial one; 1 for steps before the first."""
        epoch = step / self.steps_per_epoch
        return polynomial_decay(epoch, start=self.start, end=self.end, power=self.power)

    def get_lr(self) -> list[float | Tensor]:
        """One learning rate per parameter group, for the step to come."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def get_momentum(self) -> list[float]:
        """One momentum per parameter group, for the step to come; empty if it is left alone."""
        now, before = self.factor(self.last_epoch), self.factor(self.last_epoch - 1)
        if self.momentum == "proportional":
            # In the buffer of gradients: m * before / now, without the division.
            factor = now if self.buffer == "updates" else before
        elif self.buffer == "updates":
            factor = now / before if before > 0 else 0.0
        else:
            factor = 1.0
        return [base * factor for base in self.base_momentums]

    def step(self, epoch: int | None = None) -> None:
        """Move on by one optimizer step.

        Args:
            epoch: see PyTorch's schedulers; deprecated there.
        """
        super().step(epoch)
        if self.momentum is None:
            return
        values = self.get_momentum()
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            group["momentum"] = value
