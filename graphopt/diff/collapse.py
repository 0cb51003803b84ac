"""Modules that underwent the same, written as one: ``layers.0..23.attn``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

Part = str | tuple[int, ...]  # of a path; several numbers where modules were put together


@dataclass(frozen=True)
class Family:
    """Modules that differ in nothing but numbers of their paths.

    Attributes:
        path: all of them as one path.
        modules: their qualified names, in order of the numbers.
    """

    path: str
    modules: tuple[str, ...]


def collapse(modules: Mapping[str, Hashable]) -> tuple[Family, ...]:
    """Put modules together that have equal values and whose paths differ in one number.

    Numbers are put together from left to right, so that ``layers.*.0`` and ``layers.*.1`` can again
    become one. Families come in the order of their first module.
    """
    families = [(_split(path), [path], value) for path, value in modules.items()]
    longest = max((len(parts) for parts, _, _ in families), default=0)
    for position in range(longest):
        merged: dict[Hashable, tuple[list[Part], list[str], Hashable]] = {}
        for parts, members, value in families:
            key: Hashable = (value, tuple(parts[:position]), tuple(parts[position + 1 :]))
            is_number = position < len(parts) and isinstance(parts[position], tuple)
            if not is_number:
                key = (value, tuple(parts))
            if key not in merged:
                merged[key] = (parts, members, value)
                continue
            known, others, _ = merged[key]
            known[position] = tuple(
                sorted({*_numbers(known[position]), *_numbers(parts[position])})
            )
            others.extend(members)
        families = list(merged.values())
    return tuple(
        Family(_join(parts), tuple(sorted(members, key=_by_number)))
        for parts, members, _ in families
    )


def _by_number(path: str) -> list[tuple[int, str]]:
    """Sorts ``layers.2`` before ``layers.10``."""
    return [(int(part) if part.isdecimal() else -1, part) for part in path.split(".")]


def _split(path: str) -> list[Part]:
    return [(int(part),) if part.isdecimal() else part for part in path.split(".")]


def _numbers(part: Part) -> tuple[int, ...]:
    assert isinstance(part, tuple)
    return part


def _join(parts: Sequence[Part]) -> str:
    return ".".join(part if isinstance(part, str) else _ranges(part) for part in parts)


def _ranges(numbers: Sequence[int]) -> str:
    """``0..3,7`` for 0, 1, 2, 3, 7."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
