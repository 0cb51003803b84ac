"""What makes the variants of a model, and what happens to calls for which it can make none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from graphopt.analysis.parameter_roles import ParameterRole
from graphopt.capture.forward import Rewriter
from graphopt.model.entries import Specialisation
from graphopt.model.report import Report

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

Fallback = Literal["error", "eager"]
OnMismatch = Literal["raise", "warn", "eager"]


@dataclass(frozen=True)
class Variant:
    """One specialisation, ready to run.

    Attributes:
        call: takes the model and the call's arguments.
        engine: what runs the graph.
        holds: whether a call is one that this variant was made for.
        failure: which condition of `holds` a call does not meet.
        entry: what is reported about it.
        roles: what each parameter is, by name; empty where nothing is trained.
    """

    call: Callable[..., object]
    engine: Callable[..., Any]
    holds: Callable[..., bool]
    failure: Callable[..., str]
    entry: Specialisation
    roles: Mapping[str, ParameterRole] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Specialiser(ABC):
    """What makes variants; `graphopt.api` has the one there is.

    Attributes:
        fallback: what happens to calls that cannot be captured.
        on_mismatch: what happens to calls whose graph computes something else than eager.
    """

    fallback: Fallback | None = None
    on_mismatch: OnMismatch = "raise"

    @abstractmethod
    def compile(
        self,
        model: nn.Module,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        session: Session,
        numbers: frozenset[str] = frozenset(),
    ) -> Variant:
        """The variant for one call, with these numbers as inputs of the graph."""

    @abstractmethod
    def report(self, model: str) -> Report:
        """A report without specialisations, for a model of this class name."""

    @abstractmethod
    def rewriter(self) -> Rewriter | None:
        """What is done with the forward graph of a later call; ``None`` where nothing is."""
