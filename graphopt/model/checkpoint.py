"""The state that passes own: saved beside the optimizer's, and loaded again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.model.controller import controller_of


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that passes own (factors, histories); save them beside the optimizer's.

    Keys are ``"<pass>/<name>"``. Where ranks divide the state, each gets all of it: call this on
    every rank.

    Raises:
        StateError: ranks divide the state, and a step is not finished.
        RankError: another rank does not answer.
    """
    controller = controller_of(model)
    return {} if controller is None else controller.session.state_dict()


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Continue from a saved `state_dict`.

    A model that was not captured yet takes over what it is given, and checks it when it is.

    Raises:
        StateError: the state belongs to another model, or the model is not optimized; nothing was
            loaded.
    """
    controller = controller_of(model)
    if controller is None:
        raise StateError("the model is not optimized", hint="call graphopt.optimize(model) first")
    _check(state)
    controller.session.load(state)


def _check(state: object) -> None:
    """Whether this is what `state_dict` gives; values that are not finite are said."""
    hint = "give what graphopt.state_dict(model) has returned"
    if not isinstance(state, Mapping):
        raise StateError(f"the saved state is a {type(state).__name__}, not a dict", hint=hint)
    broken = []
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{key!r} with a {type(value).__name__}"
            raise StateError(f"the saved state has {what}, and it maps names to tensors", hint=hint)
        if value.is_floating_point() and not value.isfinite().all():
            broken.append(key)
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        warnings.warn(
            f"the saved state is not finite in {', '.join(broken[:3])}{more}: the steps from here "
            "on may not be either",
            RuntimeWarning,
            stacklevel=3,
        )


def use_scaler(model: nn.Module, scaler: object) -> None:
    """Tell passes what the loss is multiplied with before its backward.

    Gradients stay scaled, as the scaler expects; what passes read from them must not be.

    Args:
        model: an optimized model.
        scaler: a `torch.amp.GradScaler`, or anything with ``get_scale() -> float``.

    Raises:
        ArgumentError: no pass of the model does anything while it runs, or the scaler is none.
    """
    controller = controller_of(model)
    if controller is None or not controller.session.has_parts:
        raise ArgumentError(
            "no pass of this model asks for the scale of the loss",
            hint="optimize the model first, with a pass that reads gradients",
        )
    if not callable(getattr(scaler, "get_scale", None)):
        raise ArgumentError(
            f"a {type(scaler).__name__} has no get_scale()", hint="give a torch.amp.GradScaler"
        )
    enabled = getattr(scaler, "is_enabled", None)
    if callable(enabled) and not enabled():
        raise ArgumentError(
            f"the {type(scaler).__name__} is disabled, so it scales no loss",
            hint="leave graphopt.use_scaler out, or give its device: torch.amp.GradScaler('cpu')",
        )
    controller.session.use_scaler(cast("Any", scaler))
