"""NAdam set for delayed gradients."""

from __future__ import annotations

from torch.optim import NAdam
from torch.optim.optimizer import ParamsT

from graphopt.errors import ArgumentError


def delayed_nadam(
    params: ParamsT,
    lr: float = 3e-4,
    *,
    beta1: float = 0.99,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> NAdam:
    """`torch.optim.NAdam` as Ajanthan et al. use it for asynchronous pipelines.

    arXiv 2505.01099 (ICML 2025): Nesterov's look-ahead corrects delayed gradients if the momentum
    is large and the gradient itself is discounted by one minus it; NAdam with ``beta1 = 0.99`` is
    such a rule. It does not depend on the delay. Theirs runs with stashed weights. The rule without
    second moments is ``DelayedSGD(momentum=0.99, compensation="nesterov")``.

    Args:
        params: as for any optimizer.
        lr: learning rate.
        beta1: of the momentum, 0 to below 1.
        beta2: of the second moment, 0 to below 1.
        eps: added to its root.
        weight_decay: decoupled, at the current weights: a delayed gradient does not delay it.

    Raises:
        ArgumentError: a number is out of range.
    """
    if not (lr >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 and weight_decay >= 0):
        raise ArgumentError(
            f"lr={lr}, beta1={beta1}, beta2={beta2}, eps={eps}, weight_decay={weight_decay} "
            "are out of range",
            hint="use beta1=0.99, beta2=0.999 and numbers that are not negative",
        )
    return NAdam(
        params,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
    )
