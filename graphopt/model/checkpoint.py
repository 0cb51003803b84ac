"""The state that passes own: saved beside the optimizer's, and loaded again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.model.controller import Controller, controller_of
from graphopt.plan.kfac import PREFIX, UNCHECKED


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that passes own (factors, histories); save them beside the optimizer's.

    Where ranks divide the state, each gets all of it: call this on every rank.

    Raises:
        StateError: ranks divide the state, and a step is not finished.
        RankError: another rank does not answer.
    """
    controller = controller_of(model)
    if controller is None:
        return {}
    controller.settle()
    workers = controller.compiler.workers
    state = controller.state if workers is None else workers.whole(controller.state)
    return {k: v.clone() for k, v in state.items()}


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
    controller.settle()
    _check(controller, state)
    own = controller.state
    # The curvature of a step has other tensors than that of the step before.
    for name in [n for n in own if n.startswith(PREFIX)]:
        del own[name]
    if not controller.variants and any(n.startswith(PREFIX) for n in state):
        own[UNCHECKED] = torch.ones(())
    for name, tensor in state.items():
        if name in own:
            own[name].copy_(tensor)
        else:
            own[name] = tensor.clone()


def _check(controller: Controller, state: Mapping[str, Tensor]) -> None:
    for variant in controller.variants:
        if variant.entry.plan.curvature is not None:
            variant.entry.plan.curvature.check(state)
    for name, tensor in controller.state.items():
        if name.startswith(PREFIX):
            continue
        if name not in state:
            raise StateError(
                f"the saved state lacks {name!r}", hint="use the passes it was saved with"
            )
        if state[name].shape != tensor.shape:
            raise StateError(
                f"{name!r} has shape {tuple(state[name].shape)} in the saved state and "
                f"{tuple(tensor.shape)} here",
                hint="load the state of this model",
            )


def use_scaler(model: nn.Module, scaler: object) -> None:
    """Tell passes what the loss is multiplied with before its backward.

    Preconditioned gradients stay scaled, as the scaler expects; the curvature must not be.

    Args:
        model: an optimized model.
        scaler: a `torch.amp.GradScaler`, or anything with ``get_scale() -> float``.

    Raises:
        ArgumentError: the model is not optimized with a pass that asks for it, or the scaler is
            none.
    """
    controller = controller_of(model)
    accumulation = None if controller is None else controller.compiler.workers
    if accumulation is None:
        raise ArgumentError(
            "no pass of this model asks for the scale of the loss",
            hint="call graphopt.optimize(model, passes='kfac') first",
        )
    if not callable(getattr(scaler, "get_scale", None)):
        raise ArgumentError(
            f"a {type(scaler).__name__} has no get_scale()", hint="give a torch.amp.GradScaler"
        )
    accumulation.scaler = scaler
