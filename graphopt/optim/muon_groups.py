"""Parameter groups of `Muon`, and how parameters are matrices."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from graphopt.errors import ArgumentError
from graphopt.optim.groups import stays_plain
from graphopt.optim.roles import ParameterRoles

Group = dict[str, Any]
# A parameter as matrices: their number, outputs, inputs, and how they lie in it. Plain data, since
# it is part of a `state_dict`.
View = tuple[int, int, int, str]


def made_groups(
    roles: ParameterRoles, muon: Group, rest: Group, weight_decay: float
) -> list[Group]:
    """The groups that are not empty: Muon, AdamW with and without weight decay.

    Args:
        roles: of all parameters.
        muon: the options of the first group.
        rest: those of the others.
        weight_decay: of the second group.

    Raises:
        ArgumentError: a parameter is complex, or there is none to train.
    """
    matrices: list[tuple[str, nn.Parameter]] = []
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    views: list[View] = []
    for name, parameter in roles.parameters.items():
        if not parameter.requires_grad:
            continue
        if parameter.is_complex():
            raise ArgumentError(
                "Muon orthogonalises real matrices, and this one is complex",
                where=f"parameter {name!r}",
                hint="keep real and imaginary parts as two parameters, or use torch.optim.AdamW",
            )
        role, matrix = roles[name], roles[name].matrix
        if role.role in ("matrix", "convolution") and matrix is not None:
            matrices.append((name, parameter))
            views.append((matrix.groups, matrix.rows, matrix.columns, matrix.layout))
        else:
            (plain if stays_plain(role) else decayed).append((name, parameter))
    made = [
        {**muon, "params": matrices, "matrices": views},
        {**rest, "params": decayed, "weight_decay": weight_decay},
        {**rest, "params": plain, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in made):
        raise ArgumentError(
            "no parameter of the model requires a gradient",
            hint="let requires_grad be True for what is to be trained",
        )
    return [group for group in made if group["params"]]


def stored(view: View) -> tuple[int, int, int]:
    """The shape in which matrices are orthogonalised: that in which they lie in memory."""
    groups, rows, columns, layout = view
    return (groups, columns, rows) if layout == "in_out" else (groups, rows, columns)


def as_matrices(value: Tensor, view: View) -> Tensor:
    """A tensor like the parameter, as [groups, rows, columns], or as `stored` says."""
    groups, rows, columns, layout = view
    if layout != "in_out_kernel":
        return value.reshape(stored(view))
    inputs, points = value.shape[0] // groups, prod(value.shape[2:])
    apart = value.reshape(groups, inputs, rows, points)
    return apart.transpose(1, 2).reshape(groups, rows, columns)


def as_parameter(matrices: Tensor, view: View, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `as_matrices`, for a parameter of this shape."""
    groups, rows, _, layout = view
    if layout != "in_out_kernel":
        return matrices.reshape(shape)
    apart = matrices.reshape(groups, rows, shape[0] // groups, prod(shape[2:]))
    return apart.transpose(1, 2).reshape(shape)


def adamw_step(group: Group, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """The step of `torch.optim.AdamW`, with its states."""
    parameters = [p for p in group["params"] if p.grad is not None]
    for parameter in parameters:
        state = states[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    found = [states[p] for p in parameters]
    adamw(
        parameters,
        [p.grad for p in parameters],
        [s["exp_avg"] for s in found],
        [s["exp_avg_sq"] for s in found],
        [],
        [s["step"] for s in found],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def check_numbers(
    lr: float,
    adamw_lr: float,
    weight_decay: float,
    momentum: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
    betas: tuple[float, float],
) -> None:
    """Raise `ArgumentError` for an argument of `Muon` that is out of range."""
    for name, rate in (("lr", lr), ("adamw_lr", adamw_lr)):
        if not (rate > 0 and isfinite(rate)):
            raise ArgumentError(f"{name}={rate} is not a positive number", hint=f"{name}=1e-3")
    if not 0 <= weight_decay < float("inf"):
        raise ArgumentError(f"weight_decay={weight_decay} is below 0", hint="weight_decay=0.1")
    fractions = [("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])]
    for name, fraction in fractions:
        if not 0 <= fraction < 1:
            raise ArgumentError(
                f"{name}={fraction} is not between 0 and 1", hint="use 0.95, or below 1"
            )
    if not 1 <= ns_steps < 100:
        raise ArgumentError(f"ns_steps={ns_steps} is not in 1 to 99", hint="ns_steps=5")
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ArgumentError(
            f"adjust_lr_fn={adjust_lr_fn!r} is unknown", hint="'match_rms_adamw' or 'original'"
        )
