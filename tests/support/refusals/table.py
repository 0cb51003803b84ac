"""The tables of what is refused, as they stand in ``docs/limits.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.refusals import (
    around,
    asked,
    checkpoints,
    code,
    gradients,
    objects,
    states,
    values,
    writes,
)
from tests.support.refusals.example import Refusal

DOCUMENT = Path(__file__).parents[3] / "docs" / "limits.md"
BEGIN = "<!-- written by `python -m tests.support.refusals` -->"
END = "<!-- until here -->"

IN_FORWARD: tuple[Refusal, ...] = (
    *values.ALL,
    *code.ALL,
    *writes.ALL,
    *gradients.ALL,
    *objects.ALL,
    *states.ALL,
    *checkpoints.IN_FORWARD,
)
BY_CALLER: tuple[Refusal, ...] = (*asked.ALL, *checkpoints.ALL, *around.ALL)
ALL = (*IN_FORWARD, *BY_CALLER)


def with_tables(document: str) -> str:
    """The document with the tables between the two marks."""
    before, _, rest = document.partition(f"{BEGIN}\n\n")
    _, found, after = rest.partition(f"\n\n{END}")
    if not found:
        raise ValueError(f"{DOCUMENT.name} has no place for the tables: {BEGIN} … {END}")
    tables = f"{_table('forward', IN_FORWARD)}\n\n{_table('call', BY_CALLER)}"
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def _table(first: str, rows: Sequence[Refusal]) -> str:
    lines = [f"| {first} | why it is refused | what to do |", "|---|---|---|"]
    lines += [f"| {row.what} | {row.why} | {row.instead} |" for row in rows]
    return "\n".join(lines)
