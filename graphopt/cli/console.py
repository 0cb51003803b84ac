"""Where output goes: the answer to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType

from graphopt.cli.wrapping import breaking_between_words, titles_over_figures
from graphopt.errors import ArgumentError
from graphopt.notices import if_long, quiet

PATIENCE = 1.0
"""Seconds after which a phase says what it is doing."""

PIPED = 120
"""Columns of an answer that is not for a terminal."""


def show(*answers: RenderableType) -> None:
    """Print an answer; colours and width follow the terminal, ``NO_COLOR`` and ``COLUMNS``."""
    # Where there is no terminal, as in a pipe, tables get room.
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(highlight=False, soft_wrap=False, width=PIPED if piped else None)
    with breaking_between_words():
        for answer in answers:
            console.print(titles_over_figures(answer, console.width))


def show_text(text: str) -> None:
    """Print an answer that is a file format: as it is, neither wrapped nor coloured."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def show_json(command: str, answer: Mapping[str, object]) -> None:
    """Print an answer as one JSON object, its first key naming the schema."""
    show_text(document(command, answer))


def document(command: str, answer: Mapping[str, object]) -> str:
    """An answer as JSON; its schema is in `graphopt.schemas`."""
    text = json.dumps({"schema": f"graphopt.{command}/1", **answer})
    # JSON has no infinity and no NaN; as strings they survive in every reader.
    return json.dumps(json.loads(text, parse_constant=str), indent=1)


def save(path: Path, text: str) -> None:
    """Write a file that the user has named.

    Raises:
        ArgumentError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"{str(path)!r} cannot be written: {error.strerror}",
            hint="name a file in a folder that exists",
        ) from error


@contextmanager
def phase(label: str) -> Iterator[None]:
    """Run one phase; if it takes longer than `PATIENCE`, say so on stderr, and how long it took.

    ``GRAPHOPT_LOG=quiet`` turns these lines off.
    """
    if quiet():
        yield
        return
    with if_long(
        PATIENCE,
        lambda: _progress(f"{label}…"),
        lambda seconds: _progress(f" {seconds:.1f} s\n"),
    ):
        yield


def _progress(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
