"""The lines of `graphopt verify`."""

from __future__ import annotations

from dataclasses import dataclass

BAD = "out of its class"


@dataclass(frozen=True)
class Row:
    """One graph, compared with the one before it.

    Attributes:
        stage: ``"capture"``, which is compared with PyTorch eager, or a pass, which is compared
            with the graph before it.
        numerics: how far it may move results.
        allowed: the error that this allows, relative to the largest magnitude of a tensor.
        error: the largest error.
        worst: the output, gradient or buffer that has it.
        result: ``"bit-equal"``, ``"within its class"``, ``"out of its class"`` or ``"skipped"``.
    """

    stage: str
    numerics: str
    allowed: float
    error: float
    worst: str
    result: str


def first_of(stages: list[Row]) -> str | None:
    """The first stage that is out of its class."""
    return next((s.stage for s in stages if s.result == BAD), None)
