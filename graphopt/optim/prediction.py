"""Weights some updates ahead, from what an optimizer knows now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.optim.delayed_group import Settings, compensation_of, horizon_of

Prediction = Literal["velocity", "weight", "geometric"]


def predict(
    group: Settings, parameters: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]
) -> list[Tensor]:
    """New tensors: the predicted weights of parameters of one device and dtype.

    * ``"velocity"``: ``w - lr T v``. Decoupled weight decay is an update of its own and predicted
      too: ``w - lr T (v + weight_decay w)``.
    * ``"weight"``: ``w + T (w - w_before)``, with whatever made the last update.
    * ``"geometric"``: the weights after T updates with a gradient of 0, weight decay included.
      (Added weight decay is part of the gradient, and would be braked; that is left out.)

    Args:
        group: the settings.
        parameters: what to predict.
        states: the optimizer's, by parameter.
    """
    horizon = horizon_of(group)
    form = group["prediction"]
    key = "weight_before" if form == "weight" else "momentum_buffer"
    known = [p for p in parameters if key in states.get(p, {})]
    result = {id(p): p.detach().clone() for p in parameters}
    weights = [result[id(p)] for p in known]
    if known and horizon:
        history = [states[p][key] for p in known]
        if form == "weight":
            change = torch._foreach_sub(weights, history)
            torch._foreach_add_(weights, list(change), alpha=horizon)
        else:
            keep, push = _linear(group, horizon) if form == "velocity" else _free(group, horizon)
            if keep != 1:
                torch._foreach_mul_(weights, keep)
            torch._foreach_add_(weights, history, alpha=push)
    return list(result.values())


def _linear(group: Settings, horizon: float) -> tuple[float, float]:
    """Factors of weight and velocity: `horizon` times the present update."""
    lr = float(group["lr"])
    decay = float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0
    return 1 - horizon * lr * decay, -horizon * lr


def _free(group: Settings, horizon: float) -> tuple[float, float]:
    """Factors of weight and velocity after `horizon` updates with a gradient of 0.

    One of them is linear in (w, v); its power has both factors in the first row.
    """
    lr, momentum = float(group["lr"]), float(group["momentum"])
    decay = float(group["weight_decay"])
    a, b = compensation_of(group)
    if group["decoupled_weight_decay"]:
        once = [[1 - lr * decay, -lr * a * momentum], [0.0, momentum]]
    else:
        once = [[1 - lr * decay * (a + b), -lr * a * momentum], [decay, momentum]]
    power = np.linalg.matrix_power(np.array(once, dtype=np.float64), int(horizon))
    return float(power[0, 0]), float(power[0, 1])
