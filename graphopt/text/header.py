"""Reads the first lines of a text: versions, level and facts."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from graphopt.errors import TextError
from graphopt.graph import Level
from graphopt.text.sizes import Symbol
from graphopt.text.source import Line, Source
from graphopt.text.syntax import LAST_LINE, Place

FORMAT_VERSION = 1
TORCH_RELEASES = ("2.11", "2.12", "2.13")

# Products of two such sizes are still numbers to torch.
_LARGEST_SIZE = 2**48
_LEVELS = tuple(level.value for level in Level)


def running_torch() -> str:
    """``major.minor`` of the torch that runs now."""
    return ".".join(re.split(r"[.+]", torch.__version__)[:2])


def read_header(source: Source, line: Line | None) -> tuple[str, str]:
    """Level and torch release.

    Refuses a text of another format, of a torch release whose operators may mean something else,
    and one that does not reach its last line.
    """
    if line is None:
        raise TextError(
            "the text is empty",
            hint=f"a text starts with: gopt {FORMAT_VERSION} joint torch {running_torch()}",
        )
    line.expect("gopt")
    version = line.take("number", "the version of the format")
    if version.text != str(FORMAT_VERSION):
        raise line.error(
            f"this text has format {version.text}, and this graphopt reads format {FORMAT_VERSION}",
            "print the graph again with this graphopt",
            at=version,
        )
    level = line.take("word", "the level of the graph")
    if level.text not in _LEVELS:
        raise line.error(f"{level} is not a level", f"write {' or '.join(_LEVELS)}", at=level)
    line.expect("torch")
    release = line.take("number", "a torch release")
    if release.text not in TORCH_RELEASES:
        raise line.error(
            f"this text was written with torch {release.text}, but this is torch {running_torch()} "
            f"and texts of torch {TORCH_RELEASES[0]} to {TORCH_RELEASES[-1]} can be read",
            f"print the graph again with torch {running_torch()}",
            at=release,
        )
    line.finish()
    _refuse_truncated(source)
    return level.text, release.text


def _refuse_truncated(source: Source) -> None:
    numbered = enumerate(source.lines, 1)
    said = [(n, words) for n, text in numbered if (words := text.split("#")[0].rstrip())]
    number, last = said[-1]
    if last != LAST_LINE:
        raise source.error(
            Place(number, len(last) + 1),
            f"the text ends early, after line {number}",
            f"the last line of a complete text is `{LAST_LINE}`",
        )


def read_facts(line: Line) -> frozenset[str]:
    """What is known about the graph: ``facts "captured" "grouped"``."""
    line.expect("facts")
    facts = set()
    while not line.done:
        facts.add(line.string("a fact"))
    return frozenset(facts)


def read_symbol(line: Line, known: Collection[str]) -> Symbol:
    """A size that varies: ``symbol s0 = 9 from 2 to 512``."""
    line.expect("symbol")
    token = line.take("word", "the name of a symbol")
    if not token.text.isidentifier() or token.text in known:
        again = "is there twice" if token.text in known else "cannot name a symbol"
        raise line.error(f"{token} {again}", at=token)
    line.expect("=")
    hint = _whole(line, "the size in the captured call")
    least = _whole(line, "the smallest size") if line.accept("from") else None
    most = _whole(line, "the largest size") if line.accept("to") else None
    if (least is not None and hint < least) or (most is not None and hint > most):
        raise line.error(f"{hint} is not within its own range", at=token)
    return Symbol(token.text, hint, least, most)


def _whole(line: Line, what: str) -> int:
    token = line.take("number", what)
    if not token.text.removeprefix("-").isdecimal():
        raise line.error(f"{what} is a whole number", at=token)
    value = line.whole(token)
    if abs(value) >= _LARGEST_SIZE:
        raise line.error(f"{what} is below {_LARGEST_SIZE}", at=token)
    return value
