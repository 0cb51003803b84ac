"""What makes the variants of a model, and what happens to calls for which it can make none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from graphopt.capture.forward import Rewriter
from graphopt.capture.sizes import NONE, Dimensions, Named
from graphopt.model.declared import Declared
from graphopt.model.report import Report
from graphopt.model.variant import Variant

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

Fallback = Literal["error", "eager"]
OnMismatch = Literal["raise", "warn", "eager"]
Cache = Literal["verified", "captures", "off"]


@dataclass(frozen=True)
class Setting:
    """What a call is captured with, beside the model and the call's arguments.

    Attributes:
        forward: the model's own, unbound.
        session: of the model.
        numbers: those that shall be inputs of the graph, by where Dynamo finds them.
        dimensions: sizes that shall be symbols of the graph.
        varied: finds sizes that were symbols in an earlier process.
    """

    forward: Callable[..., object]
    session: Session
    numbers: frozenset[str] = frozenset()
    dimensions: Dimensions = NONE
    varied: Named = lambda _: NONE


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
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], setting: Setting
    ) -> Variant:
        """The variant for one call."""

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
