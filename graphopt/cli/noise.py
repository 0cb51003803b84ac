"""Warnings while a command runs: behind its answer, once and in short, not between progress."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO
from unittest import mock

_INSTALLED = ("/site-packages/", "/dist-packages/")
_LENGTH = 160


@contextmanager
def gathered() -> Iterator[None]:
    """Within, warnings and what libraries log to stderr wait; they are told in the end.

    The same text counts once. A warning at a line of the user's own is told with the line.
    """
    heard: dict[str, int] = {}
    write = logging.StreamHandler.emit

    def hear(said: str) -> None:
        heard[said] = heard.get(said, 0) + 1

    def warned(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,
        line: str | None = None,
    ) -> None:
        where = _library(filename) or f"{filename}:{lineno}"
        hear(f"{where}: {category.__name__}: {_short(str(message))}")

    def logged(handler: logging.StreamHandler[TextIO], record: logging.LogRecord) -> None:
        library = _library(record.pathname)
        if library and handler.stream is sys.stderr and record.levelno >= logging.WARNING:
            hear(f"{library}: {_short(record.getMessage())}")
        else:
            write(handler, record)

    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(warnings, "showwarning", warned),
            mock.patch.object(logging.StreamHandler, "emit", logged),
        ):
            yield
    finally:
        for said, times in heard.items():
            sys.stderr.write(f"{said}{f' ({times} times)' if times > 1 else ''}\n")


def _library(path: str) -> str:
    """The installed package that a file belongs to; empty for files of the user."""
    for folder in _INSTALLED:
        _, there, inside = path.replace("\\", "/").rpartition(folder)
        if there:
            return inside.partition("/")[0].removesuffix(".py")
    return ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LENGTH else line[: _LENGTH - 1] + "…"
