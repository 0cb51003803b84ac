"""Calls that cannot be captured: the user's own error, plain PyTorch, or the refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphopt.capture import is_uninitialised
from graphopt.capture.flat import first_line, location
from graphopt.capture.lock import one_at_a_time
from graphopt.errors import (
    ArgumentError,
    CaptureError,
    GraphoptError,
    MismatchError,
    PluginError,
    RankError,
    StateError,
)
from graphopt.model.parts import name_parts
from graphopt.model.tensors import tensors_of
from graphopt.model.trial import Trial

if TYPE_CHECKING:
    from graphopt.model.specialiser import Specialiser
    from graphopt.runtime.session import Session

# What is about more than one call, so that running this one plain is no way on.
_RAISED = (MismatchError, RankError, StateError, PluginError, ArgumentError)


@dataclass(frozen=True)
class Refusal:
    """A call for which no variant could be made.

    Attributes:
        session: of the model.
        plain: the model's own forward, unbound.
        model: the model.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        error: what was raised.
    """

    session: Session
    plain: Callable[..., object]
    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    error: Exception


def refuse(
    refusal: Refusal,
    settings: Specialiser,
    trained: bool,
    remember: Callable[[GraphoptError], None],
) -> object:
    """Raise what eager raises, run the call plain, or raise why it could not be captured.

    Args:
        refusal: the call.
        settings: what happens to such calls.
        trained: whether the model has trained.
        remember: called with the reason, after the call has run plain.
    """
    session, plain, model = refusal.session, refusal.plain, refusal.model
    args, kwargs = refusal.args, refusal.kwargs
    known = refusal.error if isinstance(refusal.error, GraphoptError) else _as_refusal(refusal)
    unreduced = reduces(session) and model.training
    if _falls_back(settings, trained, known) and not unreduced:
        result = run_plain(session, plain, model, args, kwargs)
        remember(known)
        return result
    if not isinstance(known, _RAISED) and _eager_raises(refusal):
        plain(model, *args, **kwargs)
    if unreduced:
        hint = "in a job it is not run plain, because its gradients would stay unreduced"
    elif isinstance(known, _RAISED):
        raise known
    else:
        hint = "optimize(..., fallback='eager') runs such calls plain"
    known.hint = f"{known.hint}; {hint}" if known.hint else hint
    if isinstance(known, CaptureError) and not session.searched:
        session.searched = True  # once: whoever catches the error has read it
        name_parts(known, model, plain, args, kwargs, session.trial)
    raise known


def _falls_back(settings: Specialiser, trained: bool, error: GraphoptError) -> bool:
    """Whether a call that failed so may run plain."""
    if isinstance(error, MismatchError):
        return settings.on_mismatch in ("eager", "warn")
    if isinstance(error, _RAISED):
        return False
    return trained if settings.fallback is None else settings.fallback == "eager"


def reduces(session: Session) -> bool:
    """Whether a plain call made now would leave gradients unreduced."""
    return torch.is_grad_enabled() and session.in_job


def run_plain(
    session: Session,
    plain: Callable[..., object],
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> object:
    """The model's own forward.

    Raises:
        RankError: in a job, from a training call; an evaluation raises in a backward, if any.
    """
    if not reduces(session):
        return plain(model, *args, **kwargs)
    if model.training:
        raise _unreduced()
    outputs = plain(model, *args, **kwargs)
    for _, tensor in tensors_of(outputs):
        if tensor.requires_grad and tensor.grad_fn is not None:
            tensor.register_hook(_refuse_backward)  # type: ignore[no-untyped-call]
    return outputs


def _refuse_backward(_: Tensor) -> None:
    raise _unreduced()


def _unreduced() -> RankError:
    return RankError(
        "this call runs as plain PyTorch, and its gradients would not be reduced across ranks",
        hint="print(model.explain()) says why it is not captured; use torch.no_grad() for "
        "evaluation",
    )


def _as_refusal(refusal: Refusal) -> CaptureError:
    """What went wrong in graphopt or in PyTorch while a variant was made."""
    error = refusal.error
    refused = CaptureError(
        f"this call cannot be captured: {type(error).__name__}: {first_line(error)}",
        where=location(refusal.plain),
        hint="please report this model",
    )
    refused.__cause__ = error
    return refused


class _WentThrough(Exception):
    """The forward of a rehearsal has not raised."""


def _eager_raises(refusal: Refusal) -> bool:
    """Whether the model's own forward raises too, tried without a trace."""
    if is_uninitialised(refusal.model):  # it would get its parameters, for good
        return False

    def rehearse(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        refusal.plain(model, *args, **kwargs)
        raise _WentThrough

    trial = Trial(refusal.model, refusal.args, refusal.kwargs, refusal.session.trial)
    try:
        with one_at_a_time(), trial.untouched():
            trial.step(rehearse)
    except _WentThrough:
        return False
    except Exception:
        return True
    return False
