"""Parameter groups by what the parameters are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.errors import ArgumentError
from graphopt.optim.roles import ParameterRoles, roles_of

if TYPE_CHECKING:
    from graphopt.analysis.parameter_roles import ParameterRole


def groups(
    model: nn.Module | ParameterRoles,
    inputs: object = None,
    *,
    weight_decay: float,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: no weight decay for norms, biases and other vectors.

    The second group has ``weight_decay=0.0``, and ``adaptive=False``, by which `LARC` and `LARS`
    leave the learning rate as it is. Parameters that do not require a gradient are left out.

    Args:
        model: the model, or its roles.
        inputs: of an example call, as in ``graphopt.optimize(model, inputs)``; a model that was
            captured needs none.
        weight_decay: of all other parameters, at least 0.
        options: of both groups, such as ``lr``.

    Returns:
        The groups that are not empty, with named parameters.

    Raises:
        CaptureError: the call cannot be captured as one graph.
        ArgumentError: a weight decay below 0, or a model whose call is not known.
    """
    if not weight_decay >= 0:
        raise ArgumentError(f"weight_decay={weight_decay} is below 0", hint="use 1e-4")
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    roles = roles_of(model, inputs)
    for name, parameter in roles.parameters.items():
        if parameter.requires_grad:
            (plain if stays_plain(roles[name]) else decayed).append((name, parameter))
    made = [
        {**options, "params": decayed, "weight_decay": weight_decay, "adaptive": True},
        {**options, "params": plain, "weight_decay": 0.0, "adaptive": False},
    ]
    return [group for group in made if group["params"]]


def stays_plain(role: ParameterRole) -> bool:
    """Whether a parameter is neither decayed nor has a rate of its own."""
    return role.role in ("norm", "bias") or role.vector
