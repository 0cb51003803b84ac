"""What `verify=` asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from graphopt.errors import ArgumentError

Level = Literal["off", "structure", "eager", "full"]

LEVELS = ("off", "structure", "eager", "full")
EVERY = 1000

_SAMPLE = re.compile(r"sample\s*(?:\{\s*(?:(\w+)\s*=\s*([^{},]*?)\s*)?\})?", re.ASCII)


@dataclass(frozen=True)
class Verify:
    """How much is checked.

    Attributes:
        level: when a graph is made.
        every: after so many steps the comparison with eager is repeated; 0 for never.
    """

    level: Level
    every: int = 0

    @classmethod
    def parse(cls, text: object) -> Verify:
        """From ``"eager"``, or ``"sample{every=1000}"``, spelt as passes with options are.

        Raises:
            ArgumentError: it is no level, or has another option.
        """
        for level in LEVELS:
            if text == level:
                return cls(level)  # type: ignore[arg-type]
        found = _SAMPLE.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            names = ", ".join(map(repr, LEVELS))
            raise ArgumentError(f"verify={text!r} is none of {names}, 'sample{{every={EVERY}}}'")
        option, value = found.groups()
        if option not in (None, "every"):
            raise ArgumentError(
                f"verify={text!r}: sample has no option {option!r}",
                hint=f"verify='sample{{every={EVERY}}}'",
            )
        if value is not None and not (value.isdecimal() and 0 < int(value) < 10**9):
            raise ArgumentError(
                f"verify={text!r}: every={value} is not a number of steps from 1 on",
                hint=f"verify='sample{{every={EVERY}}}'",
            )
        return cls("eager", int(value) if value else EVERY)

    @property
    def compares(self) -> bool:
        """Whether what runs is compared with eager."""
        return self.level in ("eager", "full")

    def __str__(self) -> str:
        return f"sample{{every={self.every}}}" if self.every else self.level
