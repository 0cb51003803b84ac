"""The settings of one parameter group of `DelayedSGD`: what is valid, and what is risky."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.errors import ArgumentError
from graphopt.optim.delay import Compensation, spike_compensation
from graphopt.optim.quadratic import DelayedQuadratic

Settings = Mapping[str, Any]

COMPENSATIONS = ("spike", "nesterov", "none")
PREDICTIONS = ("velocity", "weight", "geometric", None)
GRANULARITIES = ("global", "tensor", "filter", None)
RISKY = 3.0  # delay * (1 - momentum) from which on prediction costs more than it gains


def compensation_of(group: Settings) -> Compensation:
    """The factors of velocity and gradient."""
    chosen, momentum = group["compensation"], float(group["momentum"])
    if chosen == "spike":
        return spike_compensation(momentum, group["delay"])
    if chosen == "nesterov":
        return Compensation(momentum, 1.0)
    if chosen == "none":
        return Compensation(1.0, 0.0)
    return Compensation(*map(float, chosen))


def horizon_of(group: Settings) -> float:
    """Updates that a prediction looks ahead."""
    return float(group["delay"] if group["horizon"] is None else group["horizon"])


def check_group(group: Settings, index: int) -> None:
    """Refuse settings that cannot be used.

    Args:
        group: all settings, defaults filled in.
        index: its number, for the message.

    Raises:
        ArgumentError: for the first bad one.
    """
    where = f"parameter group {index}"
    if group["fused"]:
        raise ArgumentError(
            "a fused step is refused: it hides from autograd that weights changed",
            where=where,
            hint="leave fused away; the update is already a few operators for all parameters",
        )
    delay = group["delay"]
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
        raise ArgumentError(
            f"delay={delay!r} is no number of updates",
            where=where,
            hint="pass a whole number of at least 0, such as pipelined_delay(stage, stages)",
        )
    for name, least, below in (
        ("lr", 0.0, math.inf),
        ("momentum", 0.0, 1.0),
        ("rho", 0.0, math.inf),
        ("weight_decay", 0.0, math.inf),
        ("horizon", 0.0, math.inf),
    ):
        value = group[name]
        if name == "horizon" and value is None:
            continue
        if not least <= float(value) < below:
            limit = "not negative and finite" if below == math.inf else "0 to below 1"
            raise ArgumentError(
                f"{name}={value} is out of range",
                where=where,
                hint=f"pass a number that is {limit}",
            )
    for name, known in (("prediction", PREDICTIONS), ("braking", GRANULARITIES)):
        if group[name] not in known:
            raise ArgumentError(
                f"{name}={group[name]!r} is unknown",
                where=where,
                hint=f"use one of {', '.join(map(repr, known))}",
            )
    _check_compensation(group["compensation"], where)
    if group["prediction"] == "geometric" and not horizon_of(group).is_integer():
        raise ArgumentError(
            f"horizon={group['horizon']} is no whole number of updates",
            where=where,
            hint="round it, or use prediction='velocity'",
        )


def risk(group: Settings) -> str:
    """What a warning says about the prediction of this group; empty if it is harmless."""
    delay, momentum = group["delay"], float(group["momentum"])
    scaled = delay * (1 - momentum)
    if group["prediction"] is None or scaled <= RISKY:
        return ""
    a, b = compensation_of(group)
    stable = DelayedQuadratic(momentum, delay, a, b, group["prediction"], horizon_of(group))
    alone = DelayedQuadratic(momentum, delay, *spike_compensation(momentum, delay))
    return (
        f"delay={delay} with momentum={momentum:g}: delay * (1 - momentum) is {scaled:.3g}, over "
        f"{RISKY:g}, where prediction lowers the stable learning rate. On a quadratic loss, lr * "
        f"curvature has to stay below {stable.largest_stable():.2g}; without prediction and with "
        f"compensation='spike' the limit is {alone.largest_stable():.2g}. Try prediction=None, or "
        "a larger momentum for a smaller batch (scale_to_batch)"
    )


def _check_compensation(chosen: object, where: str) -> None:
    if isinstance(chosen, str):
        valid = chosen in COMPENSATIONS
    else:
        valid = (
            isinstance(chosen, tuple | list)
            and len(chosen) == 2
            and all(isinstance(f, int | float) and math.isfinite(f) for f in chosen)
        )
    if not valid:
        raise ArgumentError(
            f"compensation={chosen!r} is unknown",
            where=where,
            hint="use 'spike', 'nesterov', 'none', or two numbers (a, b)",
        )
