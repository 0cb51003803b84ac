"""Plan parts as data that can be searched and compared, whatever methods they are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.plan.part import PlanPart, to_data


@dataclass(frozen=True)
class Mention:
    """Where a plan speaks of a parameter or node.

    Attributes:
        part: name of the pass.
        path: place in its plan part (``"blocks[3]"``).
        values: numbers and texts that stand beside the name.
    """

    part: str
    path: str
    values: dict[str, Any]


def mentions(parts: Sequence[PlanPart], name: str) -> tuple[Mention, ...]:
    """All places that name this parameter or node."""
    return tuple(found for part in parts for found in _mentions(part.name, "", to_data(part), name))


def _mentions(part: str, path: str, data: Any, name: str) -> Iterator[Mention]:
    if isinstance(data, dict):
        listed = (v for v in data.values() if isinstance(v, list))
        if name in data.values() or any(name in values for values in listed):
            plain = {k: v for k, v in data.items() if not isinstance(v, (dict, list))}
            yield Mention(part, path, plain)
        for key, value in data.items():
            yield from _mentions(part, f"{path}.{key}".lstrip("."), value, name)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _mentions(part, f"{path}[{index}]", value, name)


def changes(before: Sequence[PlanPart], after: Sequence[PlanPart]) -> tuple[str, ...]:
    """One line per decision that differs: its path, and both values."""
    old, new = (dict(leaf for part in parts for leaf in leaves(part)) for parts in (before, after))
    return tuple(
        f"{path}: {old.get(path, 'nothing')} -> {new.get(path, 'nothing')}"
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    )


def leaves(part: PlanPart) -> Iterator[tuple[str, Any]]:
    """All numbers and texts of a part, by their paths from its name on."""
    yield from _leaves(part.name, to_data(part))


def _leaves(path: str, data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(f"{path}.{key}", value)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _leaves(f"{path}[{index}]", value)
    else:
        yield path, data


def summary(part: PlanPart) -> dict[str, Any]:
    """A part on one line: its numbers and texts, and how many entries its lists have."""
    return {
        key: len(value) if isinstance(value, (list, dict)) else value
        for key, value in to_data(part).items()
    }
