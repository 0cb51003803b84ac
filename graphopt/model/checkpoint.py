"""The state that passes own: saved beside the optimizer's, and loaded again."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.model.controller import controller_of
from graphopt.notices import warn

if TYPE_CHECKING:
    from graphopt.runtime.session import Session


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that passes own (factors, histories); save them beside the optimizer's.

    Keys are ``"<pass>/<name>"``. Where ranks divide the state, each gets all of it: call this on
    every rank.

    Raises:
        StateError: ranks divide the state, and a step is not finished.
        RankError: another rank does not answer.
    """
    controller = controller_of(model)
    return {} if controller is None else sealed(controller.session.state_dict())


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Continue from a saved `state_dict`: all of it, or nothing where it raises.

    Names, shapes, dtypes and, where a step needs it, finiteness are checked before anything
    changes. A model that was not captured yet takes over what it is given, and checks the rest
    when it is.

    Args:
        model: an optimized model.
        state: what `state_dict` has returned.
        strict: whether every pass that has a state here must find one in `state`, which must be
            whole. Otherwise passes of which it has nothing begin anew.

    Raises:
        StateError: the state belongs to another model, or the model is not optimized; nothing was
            loaded.
    """
    session = session_of(model)
    found, whole = opened(state)
    checked = session.check(found, strict=strict)
    if strict and not whole:
        # Names that no pass knows, and gaps that a pass sees, have better words than these.
        raise StateError("the saved state is not whole: it was saved with other names", hint=_WHOLE)
    _warn(found)
    session.load(checked)


def session_of(model: nn.Module) -> Session:
    """The session of an optimized model.

    Raises:
        StateError: the model is not optimized.
    """
    controller = controller_of(model)
    if controller is None:
        raise StateError("the model is not optimized", hint="call graphopt.optimize(model) first")
    return controller.session


FORMAT_VERSION = 1
_SEAL = "graphopt/format"


def sealed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the version of its format and a checksum of its names, if there is one."""
    if not state:
        return state
    return state | {_SEAL: torch.tensor(FORMAT_VERSION << 32 | _checksum(state))}


def opened(state: object) -> tuple[dict[str, Tensor], bool]:
    """The inverse: a state, and whether all of its names are those that were saved.

    Raises:
        StateError: this is no state, or of another version.
    """
    _check(state)
    found = dict(cast("Mapping[str, Tensor]", state))
    seal = found.pop(_SEAL, None)
    if seal is None or seal.dtype != torch.int64 or seal.dim():
        return found, not found
    version, checksum = divmod(int(seal), 1 << 32)
    if version != FORMAT_VERSION:
        raise StateError(
            f"the saved state has format {version}, and this graphopt reads {FORMAT_VERSION}",
            hint="load it with the graphopt that saved it",
        )
    return found, checksum == _checksum(found)


def _checksum(state: Mapping[str, Tensor]) -> int:
    return zlib.crc32("\n".join(sorted(state)).encode())


_WHOLE = "give what graphopt.state_dict(model) has returned, or strict=False"


def _check(state: object) -> None:
    """Whether this is a mapping of names to ordinary tensors."""
    hint = "give what graphopt.state_dict(model) has returned"
    if not isinstance(state, Mapping):
        raise StateError(f"the saved state is a {type(state).__name__}, not a dict", hint=hint)
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{key!r} with a {type(value).__name__}"
            raise StateError(f"the saved state has {what}, and it maps names to tensors", hint=hint)
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise StateError(f"{key!r} is no ordinary tensor in the saved state", hint=hint)


def _warn(state: Mapping[str, Tensor]) -> None:
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        warn(
            f"the saved state is not finite in {', '.join(broken[:3])}{more}: the steps from here "
            "on may not be either",
            RuntimeWarning,
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
