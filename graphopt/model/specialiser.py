"""What makes the variants of a model, and what happens to calls for which it can make none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from graphopt.analysis.parameter_roles import ParameterRole
from graphopt.capture.forward import Rewriter
from graphopt.capture.sizes import NONE, Dimensions
from graphopt.model.bands import PerBand
from graphopt.model.declared import Declared
from graphopt.model.entries import Specialisation
from graphopt.model.report import Report
from graphopt.model.sampling import Sampled

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

Fallback = Literal["error", "eager"]
OnMismatch = Literal["raise", "warn", "eager"]
Cache = Literal["verified", "captures", "off"]


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
        call, entry = self.call, self.entry
        if isinstance(call, Sampled):
            renewed, entry = call.renewed, replace(entry, samples=call.samples)
            if renewed is not None and renewed.variant is not None:
                return renewed.variant.reported
            if renewed is not None:
                return replace(entry, fallen_back=(*entry.fallen_back, *renewed.warnings))
            call = call.call
        return replace(entry, backend=call.choice()) if isinstance(call, PerBand) else entry


@dataclass(frozen=True, kw_only=True)
class Specialiser(ABC):
    """What makes variants; `graphopt.compiler` has the one there is.

    Attributes:
        fallback: what happens to calls that cannot be captured.
        on_mismatch: what happens to calls whose graph computes something else than eager.
        dynamic: which sizes of calls vary.
    """

    fallback: Fallback | None = None
    dynamic: Declared = field(default_factory=Declared)
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
        dimensions: Dimensions = NONE,
    ) -> Variant:
        """The variant for one call, with these numbers and sizes as inputs of the graph."""

    @abstractmethod
    def constant_sizes(self) -> str:
        """Why sizes cannot be inputs of graphs; empty if they can."""

    @abstractmethod
    def report(self, model: str, *, in_ddp: bool = False) -> Report:
        """A report without specialisations, for a model of this class name.

        Args:
            model: the name.
            in_ddp: whether DistributedDataParallel is around it.
        """

    @abstractmethod
    def rewriter(self) -> Rewriter | None:
        """What is done with the forward graph of a later call; ``None`` where nothing is."""
