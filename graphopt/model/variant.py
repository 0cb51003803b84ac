"""One specialisation of a model, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from graphopt.analysis.parameter_roles import ParameterRole
from graphopt.model.entries import Specialisation


@runtime_checkable
class Telling(Protocol):
    """A call of a model that knows more about itself than was known when it was made."""

    def reported(self, entry: Specialisation) -> Specialisation:
        """The entry, with that."""
        ...


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
        mode: of the model when it was made (training, gradients, autocast).
        numbers: those that are inputs of the graph, by where Dynamo finds them.
        changed: which numbers are other ones in a call, as conditions that do not hold.
        warnings: what the user has to be told once it is made.
    """

    call: Callable[..., object]
    engine: Callable[..., Any]
    holds: Callable[..., bool]
    failure: Callable[..., str]
    entry: Specialisation
    roles: Mapping[str, ParameterRole] = field(default_factory=dict)
    mode: Hashable = None
    numbers: frozenset[str] = frozenset()
    changed: Callable[..., tuple[str, ...]] = lambda *args, **kwargs: ()
    warnings: tuple[str, ...] = ()

    @property
    def reported(self) -> Specialisation:
        """The entry, with what runs calls by now, and how later comparisons came out."""
        call = self.call
        return call.reported(self.entry) if isinstance(call, Telling) else self.entry
