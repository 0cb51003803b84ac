"""What is to be cut into stages: operators, what flows between them, and what they keep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from graphopt.errors import ArgumentError


@dataclass(frozen=True)
class Operator:
    """One operator with its backward twin. Times are seconds per micro-batch.

    Attributes:
        name: unique.
        forward: seconds of its forward.
        input_grad: seconds of the gradients that earlier operators wait for.
        weight_grad: seconds of the gradients of its parameters.
        parameters: names of those that it reads.
        saved: bytes per micro-batch that it keeps for its own backward only.
        module: where it comes from, for reports.
        layer: whether it counts as one layer for the heuristics that count layers.
    """

    name: str
    forward: float
    input_grad: float = 0.0
    weight_grad: float = 0.0
    parameters: tuple[str, ...] = ()
    saved: int = 0
    module: str = ""
    layer: bool = False

    @property
    def backward(self) -> float:
        """Seconds of its whole backward."""
        return self.input_grad + self.weight_grad

    @property
    def seconds(self) -> float:
        """Seconds of forward and backward."""
        return self.forward + self.input_grad + self.weight_grad


@dataclass(frozen=True)
class Value:
    """One tensor between operators, per micro-batch.

    Attributes:
        name: unique.
        maker: the operator that makes it; empty for an input of the model, which the first stage
            gets and relays.
        readers: the operators that read it.
        bytes: what crosses each cut between its maker and its last reader, once per cut.
        gradient: bytes that come back over each of those cuts.
        saved_by: those of maker and readers whose backward reads it. A stage with any of them keeps
            it once.
        final: whether the last stage needs it (an output of the model).
    """

    name: str
    maker: str
    readers: tuple[str, ...]
    bytes: int
    gradient: int = 0
    saved_by: tuple[str, ...] = ()
    final: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter; its gradient is summed over the stages that use it.

    Attributes:
        name: unique.
        bytes: its size.
        trained: whether it has a gradient and optimizer state.
    """

    name: str
    bytes: int
    trained: bool = True


@dataclass(frozen=True)
class Link:
    """The connection between two neighbouring stages.

    Attributes:
        seconds_per_byte: the inverse of its bandwidth.
        latency: seconds of any transfer, however small.
    """

    seconds_per_byte: float = 0.0
    latency: float = 0.0

    def seconds(self, size: float) -> float:
        """Seconds of one message; nothing is sent where there is nothing to send."""
        return self.latency + self.seconds_per_byte * size if size > 0 else 0.0


@dataclass(frozen=True)
class Problem:
    """A forward graph with the costs of its step.

    Attributes:
        operators: in an order in which they can run.
        values: all tensors that one operator makes and another one reads, inputs, and outputs.
        parameters: those that the operators name.
        together: sets of operators that must be in one stage.
        link: what connects neighbouring stages.
        times: where the seconds come from (``"roofline"`` or ``"measured"``), for reports.

    Raises:
        ArgumentError: a name is unknown or used twice, a number is negative or not finite, or an
            operator reads what a later one makes.
    """

    operators: tuple[Operator, ...]
    values: tuple[Value, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    together: tuple[frozenset[str], ...] = ()
    link: Link = field(default_factory=Link)
    times: str = ""

    def __post_init__(self) -> None:
        _unique("operator", (o.name for o in self.operators))
        _unique("value", (v.name for v in self.values))
        _unique("parameter", (p.name for p in self.parameters))
        for o in self.operators:
            _numbers(f"operator {o.name!r}", o.forward, o.input_grad, o.weight_grad, o.saved)
        for p in self.parameters:
            _numbers(f"parameter {p.name!r}", p.bytes)
        _numbers("link", self.link.seconds_per_byte, self.link.latency)
        position = self.position
        parameters = {p.name for p in self.parameters}
        for o in self.operators:
            _known(f"operator {o.name!r}", o.parameters, parameters, "parameter")
        for v in self.values:
            self._check_value(v, position)
        for group in self.together:
            _known("together", group, position, "operator")

    @property
    def position(self) -> dict[str, int]:
        """Position of each operator by its name."""
        return {o.name: i for i, o in enumerate(self.operators)}

    @property
    def seconds(self) -> float:
        """Seconds of all operators, forward and backward."""
        return math.fsum(o.seconds for o in self.operators)

    def _check_value(self, value: Value, position: dict[str, int]) -> None:
        place = f"value {value.name!r}"
        _numbers(place, value.bytes, value.gradient)
        _known(place, value.readers, position, "operator")
        if value.maker:
            _known(place, (value.maker,), position, "operator")
        _known(place, value.saved_by, {value.maker, *value.readers}, "maker or reader")
        made = position[value.maker] if value.maker else -1
        early = [r for r in value.readers if position[r] <= made]
        if early:
            raise ArgumentError(
                f"operator {early[0]!r} reads what {value.maker!r} makes after it",
                where=place,
                hint="list the operators in an order in which they can run",
            )


def _unique(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ArgumentError(f"there are two {what}s {twice[0]!r}", hint="give each its own name")


def _numbers(place: str, *numbers: float) -> None:
    for number in numbers:
        if not (math.isfinite(number) and number >= 0):
            raise ArgumentError(
                f"{number} is not a time or a size",
                where=place,
                hint="seconds and bytes must be finite and not negative",
            )


def _known(place: str, names: Iterable[str], existing: Iterable[str], what: str) -> None:
    existing = existing if isinstance(existing, dict | set) else set(existing)
    for name in names:
        if name not in existing:
            raise ArgumentError(
                f"there is no {what} {name!r}", where=place, hint=f"name an existing {what}"
            )
