"""What changes from call to call and makes captures anew: counters, schedules, growing lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# How many captures one changing value may cause. Attributes of modules that change are counters and
# schedules, which go on; an argument may as well be one of a few values.
MAX_OF_ATTRIBUTE = 4
MAX_OF_ARGUMENT = 8

_NUMBER = re.compile(r"^([LG]\[.+?) == -?(\d+(\.\d*)?(e[-+]?\d+)?)$")
_LENGTH = re.compile(r"^len\((L\[.+)\) == \d+$|^not (L\[.+)$")


@dataclass(frozen=True)
class Cause:
    """A value that is another one than at a capture.

    Attributes:
        source: where it is, as Dynamo writes it.
        line: the user's line that reads it.
        number: whether it is a number (or else the length of a container).
    """

    source: str
    line: str
    number: bool

    @property
    def name(self) -> str:
        """As users write it: ``self.layers.1.steps``, ``temperature``."""
        return readable(self.source)

    @property
    def limit(self) -> int:
        """How many captures it may cause."""
        return MAX_OF_ATTRIBUTE if self.source.startswith("L['self']") else MAX_OF_ARGUMENT


def readable(source: str) -> str:
    """Where a value is, as users write it: ``self.layers.1.steps`` for Dynamo's source."""
    text = re.sub(r"\.__dict__\['_modules'\]\['(\w+)'\]", r".\1", source)
    text = re.sub(r"\._modules\['(\w+)'\]", r".\1", text)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", text)


def cause_of(failure: str) -> Cause | None:
    """The changing value that a guard speaks of; ``None`` for shapes, modes and whatever else."""
    condition, _, comment = failure.partition("#")
    condition = condition.strip()
    line = comment.partition(" (HINT:")[0].strip()
    if found := _NUMBER.match(condition):
        return Cause(found[1], line, number=True)
    if found := _LENGTH.match(condition):
        return Cause(found[1] or found[2], line, number=False)
    return None


class Varying:
    """Which values of one model change, and what is done about each.

    Attributes:
        inputs: numbers that are captured as inputs of the graph from now on.
        any_ended: whether any value has made as many captures as it may.
    """

    def __init__(self) -> None:
        self.inputs: frozenset[str] = frozenset()
        self._fixed: set[str] = set()
        self._captures: dict[str, int] = {}
        self.any_ended = False

    def to_try(self, causes: Iterable[Cause]) -> frozenset[str]:
        """The numbers that the next capture should take as inputs."""
        new = {c.source for c in causes if c.number and c.source not in self._fixed}
        return self.inputs | new

    def learn(self, tried: frozenset[str], made: frozenset[str]) -> None:
        """Which inputs a capture has that should have had those that were tried."""
        self.inputs |= made
        self._fixed |= tried - self.inputs

    def count(self, causes: Iterable[Cause]) -> list[Cause]:
        """Count a capture; returns the causes that make no further one."""
        ended = []
        for cause in causes:
            self._captures[cause.source] = made = self._captures.get(cause.source, 0) + 1
            if made == cause.limit:
                ended.append(cause)
        self.any_ended |= bool(ended)
        return ended

    def ended(self, causes: Iterable[Cause]) -> bool:
        """Whether one of them has made as many captures as it may."""
        return any(self._captures.get(cause.source, 0) >= cause.limit for cause in causes)
