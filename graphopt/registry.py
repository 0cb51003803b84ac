"""The passes that exist: built-in ones, and those of installed packages.

A package offers a pass as an entry point of the group ``graphopt.passes``: the pass's name, and the
class as value. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points

from graphopt.errors import PluginError, SpecError
from graphopt.passbase import Pass

GROUP = "graphopt.passes"

BUILT_IN = {
    "cleanup": "graphopt.passes.cleanup:Cleanup",
    "fold_inference": "graphopt.passes.fold_inference:FoldInference",
    "group_gradients": "graphopt.passes.group_gradients:GroupGradients",
    "kfac": "graphopt.passes.kfac:Kfac",
    "schedule": "graphopt.passes.schedule:Schedule",
}


@dataclass(frozen=True)
class _Entry:
    value: str
    origin: str


def names() -> tuple[str, ...]:
    """The names of all passes, sorted.

    Raises:
        PluginError: two distributions offer a pass of the same name.
    """
    return tuple(sorted(_entries()))


def origins() -> dict[str, str]:
    """Where each pass comes from: ``"built-in"``, or a distribution with its version.

    Raises:
        PluginError: two distributions offer a pass of the same name.
    """
    return {name: _entries()[name].origin for name in names()}


def get(name: str) -> type[Pass]:
    """The class of the pass with this name.

    Raises:
        SpecError: there is none.
        PluginError: it cannot be imported, is no pass or has another name; or two distributions
            offer a pass of the same name.
    """
    entries = _entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3)
        start = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise SpecError(f"unknown pass {name!r}", hint=f"{start}`graphopt passes` lists all passes")
    entry = entries[name]
    if entry.origin == "built-in":
        found = _load(entry.value)
    else:
        try:
            found = _load(entry.value)
        except Exception as error:
            raise PluginError(
                f"pass {name!r} of {entry.origin} cannot be imported: {error!r}",
                where=entry.value,
                hint="repair or uninstall that package",
            ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PluginError(f"{entry.value} of {entry.origin} is not a subclass of Pass")
    declared = getattr(found, "name", None)
    if declared != name:
        raise PluginError(
            f"{entry.origin} offers a pass as {name!r} whose class says its name is {declared!r}",
            where=entry.value,
            hint="make the entry point's name and the class's `name` equal",
        )
    return found


def _load(value: str) -> object:
    module, _, attribute = value.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _entries() -> Mapping[str, _Entry]:
    return _entries_on(tuple(sys.path))


@lru_cache(maxsize=4)
def _entries_on(path: tuple[str, ...]) -> Mapping[str, _Entry]:
    """The table for one `sys.path`, which is what the search for entry points depends on."""
    table = {name: _Entry(value, "built-in") for name, value in BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        distribution = point.dist
        origin = f"{distribution.name} {distribution.version}" if distribution else "unknown"
        if point.name in table:
            raise PluginError(
                f"two passes have the name {point.name!r}: "
                f"one is {table[point.name].origin}, the other is from {origin}",
                where=point.value,
                hint=f"uninstall one of them, or rename its entry point in the group {GROUP!r}",
            )
        table[point.name] = _Entry(point.value, origin)
    return table
