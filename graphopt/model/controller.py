"""Which specialisation runs a call of one model, and what makes new ones."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from graphopt.model.entries import Specialisation
from graphopt.model.report import Report

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")

# How many specialisations one model keeps; the least recently used one goes first.
MAX_SPECIALISATIONS = 8

# Where the controller lies in the model's own dictionary.
KEY = "_graphopt"


@dataclass(frozen=True)
class Variant:
    """One specialisation, ready to run.

    Attributes:
        call: takes the model and the call's arguments.
        engine: what runs the graph.
        holds: whether a call is one that this variant was made for.
        failure: which condition of `holds` a call does not meet.
        entry: what is reported about it.
    """

    call: Callable[..., object]
    engine: Callable[..., Any]
    holds: Callable[..., bool]
    failure: Callable[..., str]
    entry: Specialisation


class Specialiser(Protocol):
    """What makes variants; `graphopt.api` has the one there is."""

    def compile(
        self,
        model: nn.Module,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        session: Session,
    ) -> Variant:
        """The variant for one call."""

    def report(self, model: str) -> Report:
        """A report without specialisations, for a model of this class name."""


class Controller:
    """Chooses the specialisation for each call of one model, and makes new ones.

    Args:
        base: the model's own class.
        compiler: makes variants; holds the arguments of `optimize`.
        session: what the model keeps between its steps.
    """

    def __init__(self, base: type[nn.Module], compiler: Specialiser, session: Session) -> None:
        self.base = base
        self.compiler = compiler
        self.session = session
        self.variants: list[Variant] = []
        self.made = 0

    def __call__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        """Run the variant whose conditions hold; make one where none does."""
        for index, variant in enumerate(self.variants):
            if variant.holds(model, *args, **kwargs):
                if index:
                    self.variants.insert(0, self.variants.pop(index))
                return variant.call(model, *args, **kwargs)
        return self.specialise(model, args, kwargs).call(model, *args, **kwargs)

    def specialise(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Variant:
        """Make the variant for this call; on any error the model is given back as it was."""
        reason = self.variants[0].failure(model, *args, **kwargs) if self.variants else ""
        try:
            variant = self.compiler.compile(model, self.base.forward, args, kwargs, self.session)
        except BaseException:
            restore(model)
            raise
        self.made += 1
        self.variants.insert(0, variant)
        if reason:
            log.info("captured again for %s, because of %s", variant.entry.signature, reason)
        if len(self.variants) > MAX_SPECIALISATIONS:
            self.variants.pop()
            if self.made == MAX_SPECIALISATIONS + 1:
                warnings.warn(
                    f"this model was captured {self.made} times, for as many kinds of calls (the "
                    f"last: {variant.entry.signature}, because of {reason}); only "
                    f"{MAX_SPECIALISATIONS} are kept. Pad or bucket the inputs to a few shapes.",
                    stacklevel=5,
                )
        return variant

    def report(self, model: nn.Module) -> Report:
        """What was done so far, newest specialisation last."""
        report = self.compiler.report(type(model).__name__)
        return replace(
            report,
            specialisations=tuple(v.entry for v in reversed(self.variants)),
            notes=report.notes + self.session.notes(),
        )


def controller_of(model: nn.Module) -> Controller | None:
    """The controller of an optimized model; ``None`` for any other."""
    found = model.__dict__.get(KEY)
    return found if isinstance(found, Controller) else None


def restore(model: nn.Module) -> None:
    """Give the model its own class back."""
    controller = controller_of(model)
    if controller is not None:
        model.__class__ = controller.base
        del model.__dict__[KEY]
