"""Where a name may be broken that is longer than its column: behind a dot, not inside of a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from rich import _wrap
from rich.cells import cell_len

_BEHIND = ("./:,", "_")


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
