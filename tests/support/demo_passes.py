"""Passes for the tests of the pass layer, offered as plugins by `tests.support.plugins`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from graphopt.errors import ArgumentError
from graphopt.passbase import Applied, Outcome, Pass, PassContext

if TYPE_CHECKING:
    from collections import OrderedDict

    from graphopt.graph import Graph


@dataclass(frozen=True)
class Idle(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "idle"

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class Tuned(Idle):
    """Has an option of every type."""

    name: ClassVar[str] = "tuned"

    count: int = 3
    rate: float = 0.5
    fast: bool = False
    label: str = "plain"
    mode: Literal["stale", "fresh"] = "stale"
    interval: Literal["stale"] | int = "stale"
    limit: int | None = None
    keep: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    either: str | bool | float = "x"
    made: tuple[str, ...] = field(default_factory=lambda: ("a",))


@dataclass(frozen=True)
class Needy(Idle):
    """Has an option without default, and refuses some values."""

    name: ClassVar[str] = "needy"

    stages: int

    def __post_init__(self) -> None:
        if self.stages < 0:
            raise ValueError("stages must not be negative")
        if self.stages == 0:
            raise ArgumentError("there are no stages", hint="use one")


@dataclass(frozen=True)
class Odd(Idle):
    """Has an option that the spec language cannot say."""

    name: ClassVar[str] = "odd"

    call: Callable[[], int] = int


@dataclass(frozen=True)
class Unreadable(Idle):
    """Has an option whose type is not there at run time."""

    name: ClassVar[str] = "unreadable"

    table: OrderedDict[str, str] | None = None


@dataclass(frozen=True)
class Canonical(Idle):
    name: ClassVar[str] = "canonical"
    provides = frozenset({"tidy"})


@dataclass(frozen=True)
class Factors(Idle):
    name: ClassVar[str] = "factors"
    requires = frozenset({"tidy"})
    provides = frozenset({"factored"})
    conflicts = frozenset({"lowered"})
    levels = frozenset({"joint"})


@dataclass(frozen=True)
class Lower(Idle):
    name: ClassVar[str] = "lower"
    provides = frozenset({"lowered"})


@dataclass(frozen=True)
class UsesFactors(Idle):
    name: ClassVar[str] = "uses_factors"
    requires = frozenset({"factored"})


@dataclass(frozen=True)
class Marks(Idle):
    """Applies something without touching the graph."""

    name: ClassVar[str] = "marks"

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return Outcome(applied=(Applied("y", "marked"),))


ALL = (Idle, Tuned, Needy, Odd, Unreadable, Canonical, Factors, Lower, UsesFactors, Marks)
