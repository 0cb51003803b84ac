"""SGD with momentum for gradients that arrive some updates late.

With ``v' = m v + g`` for a gradient g that is D updates old:

* generalised Spike Compensation: ``w' = w - lr * (a v' + b g)``; `spike_compensation` gives a and b
  for a delay;
* Linear Weight Prediction: the forward pass uses weights predicted T updates ahead, from the
  velocity, ``w - lr T v``, or from the last update, ``w + T (w - w_before)``;
* geometric prediction: the weights after T updates without any further gradient, so the velocity
  decays; FTPipe (Eliad et al., USENIX ATC 2021) predicts in this form;
* Adaptive Braking: see `graphopt.optim.braking`.

The first two are of Kosson et al., arXiv 2003.11666, who combine them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from graphopt.errors import ArgumentError
from graphopt.notices import warn
from graphopt.optim.braking import Granularity, braking_factors
from graphopt.optim.delayed_group import check_group, compensation_of, risk
from graphopt.optim.prediction import Prediction, predict
from graphopt.optim.tensors import begin_step

Group = dict[str, Any]


class DelayedSGD(Optimizer):
    """SGD with momentum and a delay per parameter group, in a few fused operators per group.

    With ``delay=0`` and neither prediction nor braking it is `torch.optim.SGD`, to the last bit;
    with ``delay=1`` and spike compensation it is that with ``nesterov=True``. Parameters whose
    ``grad`` is ``None`` are left alone. All arguments except `rebind` may differ between groups.

    Prediction concerns the forward pass: run it within `predicted`. Prediction with a long horizon
    lowers the largest stable learning rate, which compensation does not; if ``delay * (1 -
    momentum)`` is over 3, a warning says by how much. `scale_to_batch` gives a momentum for small
    batches with which long delays are harmless.

    Args:
        params: parameters or groups of them; a group of a pipeline stage has its own ``delay``.
        lr: learning rate, at least 0.
        delay: D, updates between the forward and the arrival of its gradient, at least 0.
        momentum: m, 0 to below 1.
        compensation: ``"spike"`` for SC_delay; ``"nesterov"`` for ``a = m, b = 1`` at any delay
            (Ajanthan et al., arXiv 2505.01099, with a momentum of 0.99; theirs is
            `delayed_nadam`); ``"none"``; or both factors: ``spike_compensation(m, 2 * D)``.
        prediction: ``"velocity"``, ``"weight"``, ``"geometric"`` or ``None``.
        horizon: T, in updates, at least 0, whole for the geometric form; ``None`` is the delay.
        braking: over what Adaptive Braking takes its cosine; ``None`` for no braking.
        rho: strength of the braking, at least 0.
        weight_decay: at least 0, always of the current weights: a delayed gradient does not
            delay it.
        decoupled_weight_decay: shrink weights by ``1 - lr * weight_decay`` before each update, and
            let predictions shrink them as well, instead of adding ``weight_decay * w`` to the
            gradient, where compensation would treat it as late.
        maximize: ascend.
        rebind: give parameters new memory at each update instead of writing into it. What shares
            the old memory, such as ``p.data`` taken before, keeps the old weights: weight
            stashing without a copy. A graph that autograd recorded on the parameter itself is *not*
            safe: some operators (convolutions) save the parameter, and read what it has later.
        fused: only ``False``. A fused step hides that it changed weights from autograd.

    Raises:
        ArgumentError: an argument is out of range or unknown, or a parameter is not real.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        delay: int = 0,
        momentum: float = 0.9,
        compensation: Literal["spike", "nesterov", "none"] | tuple[float, float] = "spike",
        prediction: Prediction | None = None,
        horizon: float | None = None,
        braking: Granularity | None = None,
        rho: float = 2.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        rebind: bool = False,
        fused: bool = False,
    ) -> None:
        self._built = False
        self.rebind = rebind
        defaults = {
            "lr": lr,
            "delay": delay,
            "momentum": momentum,
            "compensation": compensation,
            "prediction": prediction,
            "horizon": horizon,
            "braking": braking,
            "rho": rho,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "fused": fused,
        }
        super().__init__(params, defaults)
        self._built = True
        _warn(self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with settings of their own; those that are missing are the defaults.

        Raises:
            ArgumentError: see the class.
        """
        check_group({**self.defaults, **param_group}, len(self.param_groups))
        super().add_param_group(param_group)
        dtypes = [p.dtype for p in self.param_groups[-1]["params"] if not p.is_floating_point()]
        if dtypes:
            self.param_groups.pop()
            raise ArgumentError(
                f"a parameter of {dtypes[0]} cannot be updated",
                where=f"parameter group {len(self.param_groups)}",
                hint="pass real floating-point parameters",
            )
        if self._built:
            _warn(self.param_groups[-1:])

    def set_delay(self, delay: int) -> None:
        """Give all groups one delay, such as that of the pipeline stage of this rank.

        Raises:
            ArgumentError: it is negative.
        """
        if all(group["delay"] == delay for group in self.param_groups):
            return
        for index, group in enumerate(self.param_groups):
            check_group({**group, "delay": delay}, index)
        for group in self.param_groups:
            group["delay"] = delay
        _warn(self.param_groups)

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
            ArgumentError: a gradient is sparse.
        """
        loss: float | None = begin_step(self.param_groups, closure)
        updates = [
            _Update(self, group, parameters)
            for group in self.param_groups
            for parameters in _alike([p for p in group["params"] if p.grad is not None])
        ]
        _brake(updates)
        for update in updates:
            update.apply(self.rebind)
        return loss

    @torch.no_grad()
    def predict(self) -> dict[Tensor, Tensor]:
        """The weights to run the forward pass with, by parameter.

        New tensors, without a graph; only for parameters of groups with a prediction. Before the
        first update they equal the weights.
        """
        return {
            parameter: predicted
            for group in self.param_groups
            if group["prediction"] is not None
            for parameters in _alike(group["params"])
            for parameter, predicted in zip(
                parameters, predict(group, parameters, self.state), strict=True
            )
        }

    @contextmanager
    def predicted(self) -> Iterator[None]:
        """Within the block, parameters have their predicted weights; after it, their own bits.

        A backward behind the block uses the current weights, as in the paper; one within the block
        uses the predicted ones. Autograd does not notice that weights change. The block must not
        change them itself: no `step` inside.
        """
        predicted = self.predict()
        parameters = [parameter.data for parameter in predicted]
        kept = [weight.clone() for weight in parameters]
        try:
            if parameters:
                torch._foreach_copy_(parameters, list(predicted.values()))
            yield
        finally:
            if parameters:
                torch._foreach_copy_(parameters, kept)


class _Update:
    """One update of parameters of one group that have the same device and dtype."""

    def __init__(self, optimizer: DelayedSGD, group: Group, parameters: list[Tensor]) -> None:
        self.group = group
        self.parameters = parameters
        self.states = [optimizer.state[p] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if group["maximize"]:
            gradients = list(torch._foreach_neg(gradients))
        decay = float(group["weight_decay"])
        if decay and not group["decoupled_weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
        self.gradients = gradients

    def apply(self, rebind: bool) -> None:
        """Update velocities and weights."""
        group, lr = self.group, float(self.group["lr"])
        steps = self._steps()
        weights = [p.data for p in self.parameters]
        if group["prediction"] == "weight":
            self._remember(weights, rebind)
        decay = float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0
        if not rebind:
            # In place on the parameters themselves: autograd shall notice.
            _move(self.parameters, steps, lr, decay)
            return
        if decay:
            moved = list(torch._foreach_mul(weights, 1 - lr * decay))
        else:
            factor, step = steps.pop(0)
            moved = list(torch._foreach_add(weights, step, alpha=-lr * factor))
        _move(moved, steps, lr, 0.0)
        for parameter, weight in zip(self.parameters, moved, strict=True):
            parameter.data = weight

    def _steps(self) -> list[tuple[float, list[Tensor]]]:
        """``a v' + b g``, which the learning rate multiplies, as terms."""
        momentum = float(self.group["momentum"])
        a, b = compensation_of(self.group)
        needed = self.group["prediction"] in ("velocity", "geometric") or self.group["braking"]
        if momentum == 0 and not needed:
            # The velocity is the gradient, and nobody asks for it later.
            return [(a + b, self.gradients)]
        velocities = self._velocities(momentum)
        if b == 0:
            return [(a, velocities)]
        if b == 1:  # added up first, as Nesterov's momentum is elsewhere: to the last bit
            return [(1.0, list(torch._foreach_add(self.gradients, velocities, alpha=a)))]
        return [(a, velocities), (b, self.gradients)]

    def _velocities(self, momentum: float) -> list[Tensor]:
        old, late = [], []
        for state, gradient in zip(self.states, self.gradients, strict=True):
            if "momentum_buffer" in state:
                old.append(state["momentum_buffer"])
                late.append(gradient)
            else:
                state["momentum_buffer"] = gradient.detach().clone()
        if old:
            torch._foreach_mul_(old, momentum)
            torch._foreach_add_(old, late)
        return [state["momentum_buffer"] for state in self.states]

    def _remember(self, weights: Sequence[Tensor], rebind: bool) -> None:
        """Keep the weights before the update; the old memory itself where it is left anyway."""
        for state, weight in zip(self.states, weights, strict=True):
            if rebind:
                state["weight_before"] = weight
            elif "weight_before" in state:
                state["weight_before"].copy_(weight)
            else:
                state["weight_before"] = weight.clone()


def _move(
    weights: list[Tensor], steps: Sequence[tuple[float, list[Tensor]]], lr: float, decay: float
) -> None:
    if decay:
        torch._foreach_mul_(weights, 1 - lr * decay)
    for factor, step in steps:
        torch._foreach_add_(weights, step, alpha=-lr * factor)


def _brake(updates: Sequence[_Update]) -> None:
    """Scale the gradients of the groups that brake; a global cosine is over all of those alike."""
    settings = {(u.group["braking"], float(u.group["rho"])) for u in updates if u.group["braking"]}
    for granularity, rho in sorted(settings):
        chosen = [
            u for u in updates if (u.group["braking"], float(u.group["rho"])) == (granularity, rho)
        ]
        gradients = [g for u in chosen for g in u.gradients]
        velocities = [state.get("momentum_buffer", None) for u in chosen for state in u.states]
        velocities = [
            torch.zeros_like(g) if v is None else v
            for g, v in zip(gradients, velocities, strict=True)
        ]
        factors = iter(braking_factors(gradients, velocities, granularity, rho))
        for update in chosen:
            own = [next(factors) for _ in update.gradients]
            update.gradients = list(torch._foreach_mul(update.gradients, own))


def _alike(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters that one fused operator can update, in their order."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(found.values())


def _warn(groups: Sequence[Group]) -> None:
    """One warning about the worst group."""
    risks = [(group["delay"] * (1 - group["momentum"]), risk(group)) for group in groups]
    worst = max((r for r in risks if r[1]), default=None)
    if worst is not None:
        warn(worst[1], RuntimeWarning)
