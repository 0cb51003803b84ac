"""Tables in little room: names break behind dots, not inside words; titles make room for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from rich import _wrap
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table

_BEHIND = ("./:,", "_")

ROOMY = 100
"""Columns from which on titles of figures stay in one line."""


@contextmanager
def breaking_between_words() -> Iterator[None]:
    """Within, rich breaks long names there; it has no setting for it."""
    with mock.patch.object(_wrap, "chop_cells", pieces):
        yield


def pieces(text: str, width: int) -> list[str]:
    """A name in pieces of at most so many columns.

    A piece ends behind a dot or the like; where there is none in reach, at the width.
    """
    found = []
    while cell_len(text) > width:
        head = text[:width]
        while len(head) > 1 and cell_len(head) > width:
            head = head[:-1]
        cuts = (max(head.rfind(mark) for mark in marks) + 1 for marks in _BEHIND)
        cut = next(filter(None, cuts), len(head))
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text] if text or not found else found


def titles_over_figures(answer: RenderableType, width: int) -> RenderableType:
    """The answer; where it is narrow, titles wider than their figures are broken between words.

    That leaves room for names, which else would be broken within words.
    """
    if width < ROOMY:
        for table in _tables(answer):
            for column in table.columns:
                if column.justify == "right" and isinstance(column.header, str):
                    column.header = column.header.replace(" ", "\n")
    return answer


def _tables(answer: RenderableType) -> Iterator[Table]:
    if isinstance(answer, Table):
        yield answer
    elif isinstance(answer, Group):
        for part in answer.renderables:
            yield from _tables(part)
