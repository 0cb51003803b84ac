"""What a field of a plan part may hold beside its type, as part of the type.

``size: Annotated[int, Within(1)]`` is an ``int`` to everybody; who reads a plan checks the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

_ENDLESS = 2.0**62  # no number of things is so large
_TINY, _HUGE = math.ulp(0.0), 1.7976931348623157e308


@dataclass(frozen=True)
class Within:
    """Numbers between two ends, both included."""

    least: float = -math.inf
    most: float = math.inf

    def allows(self, value: object) -> bool:
        """Whether a value is one of them."""
        return isinstance(value, (int, float)) and self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most >= _ENDLESS:
            return "positive" if self.least == _TINY else f"at least {self.least:g}"
        return f"between {self.least:g} and {self.most:g}"


@dataclass(frozen=True)
class OneOf:
    """Texts out of a few."""

    options: tuple[str, ...]

    def allows(self, value: object) -> bool:
        """Whether a value is one of them."""
        return value in self.options

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.options))}"


# A place in a list, a number of bytes, a number of things.
Count = Annotated[int, Within(0, 2**63 - 1)]
OneOrMore = Annotated[int, Within(1, 2**63 - 1)]
Seconds = Annotated[float, Within(0.0)]
Positive = Annotated[float, Within(_TINY, _HUGE)]
NotNegative = Annotated[float, Within(0.0, _HUGE)]
Share = Annotated[float, Within(0.0, 1.0)]
