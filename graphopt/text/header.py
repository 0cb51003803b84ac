"""The first lines of a text: versions, level and facts."""

from __future__ import annotations

import re

import torch

from graphopt.graph import Level
from graphopt.text.source import Line

FORMAT_VERSION = 1
TORCH_RELEASES = ("2.11", "2.12", "2.13")

_LEVELS = (Level.JOINT.value, Level.INFERENCE.value)


def read_header(line: Line) -> tuple[str, str]:
    """Level and torch release; refuses texts of another format or of an unknown release."""
    line.expect("gopt")
    version = line.take("number", "the version of the format")
    if version.text != str(FORMAT_VERSION):
        raise line.error(
            f"this text has format {version.text}; this graphopt reads format {FORMAT_VERSION}",
            "print the graph again with this graphopt",
            at=version,
        )
    level = line.take("word", "the level of the graph")
    if level.text not in _LEVELS:
        raise line.error(f"`{level.text}` is not a level", f"one of {', '.join(_LEVELS)}", at=level)
    line.expect("torch")
    release = line.take("number", "a torch release")
    if release.text not in TORCH_RELEASES:
        raise line.error(
            f"this text was written with torch {release.text}; this is torch {running_torch()}, "
            f"and texts of {TORCH_RELEASES[0]} to {TORCH_RELEASES[-1]} can be read",
            f"capture and print the graph again with torch {running_torch()}",
            at=release,
        )
    line.finish()
    return level.text, release.text


def running_torch() -> str:
    """``major.minor`` of the torch that runs now."""
    return ".".join(re.split(r"[.+]", torch.__version__)[:2])


def read_facts(line: Line) -> set[str]:
    line.expect("facts")
    facts = set()
    while not line.done:
        facts.add(line.string("a fact"))
    return facts
