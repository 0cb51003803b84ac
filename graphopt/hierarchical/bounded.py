"""A result together with a bound of its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Bounded(Generic[T]):
    """A value that is at most `bound` away from what it stands for.

    Attributes:
        value: what was computed.
        bound: of the error: the Frobenius norm for matrices, the Euclidean norm for vectors (each
            column of several), the absolute difference for numbers. It includes rounding.
    """

    value: T
    bound: float
