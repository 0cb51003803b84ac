"""What exists by name: passes, their plan parts and runtime parts, backends, and presets.

Built-in ones are listed here; an installed package offers its own as entry points of the same
groups, the name as key and the class as value. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from graphopt.errors import PluginError, SpecError


@dataclass(frozen=True)
class Table:
    """One kind of thing.

    Attributes:
        group: entry points that add to it.
        what: what one of them is called.
        base: ``module:class`` that all of them derive from.
        built_in: those of graphopt itself, as ``module:class`` by name.
    """

    group: str
    what: str
    base: str
    built_in: tuple[tuple[str, str], ...]


def _table(group: str, what: str, base: str, **built_in: str) -> Table:
    return Table(f"graphopt.{group}", what, f"graphopt.{base}", tuple(built_in.items()))


PASSES = _table(
    "passes",
    "pass",
    "passbase:Pass",
    batch_statistics="graphopt.passes.batch_statistics:BatchStatistics",
    cleanup="graphopt.passes.cleanup:Cleanup",
    flexpoint="graphopt.passes.flexpoint:Flexpoint",
    fold_inference="graphopt.passes.fold_inference:FoldInference",
    group_gradients="graphopt.passes.group_gradients:GroupGradients",
    kfac="graphopt.passes.kfac:Kfac",
    low_rank="graphopt.passes.low_rank:LowRank",
    partition="graphopt.passes.partition:Partition",
    precision="graphopt.passes.precision:Precision",
    schedule="graphopt.passes.schedule:Schedule",
)
PLAN_PARTS = _table(
    "plan_parts",
    "plan part",
    "plan.part:PlanPart",
    batch_statistics="graphopt.plan.batch_statistics:Norms",
    flexpoint="graphopt.plan.flexpoint:FlexTensors",
    group_gradients="graphopt.plan.group_gradients:Reduction",
    kfac="graphopt.plan.kfac:Curvature",
    partition="graphopt.plan.partition:Stages",
    precision="graphopt.plan.precision:LossScaling",
)
RUNTIME_PARTS = _table(
    "runtime_parts",
    "runtime part",
    "runtime.part:RuntimePart",
    batch_statistics="graphopt.runtime.batch_statistics:BatchStatistics",
    flexpoint="graphopt.runtime.flexpoint:Flexpoint",
    group_gradients="graphopt.runtime.group_gradients:GroupGradients",
    kfac="graphopt.runtime.kfac:Kfac",
    partition="graphopt.runtime.partition:Partition",
    precision="graphopt.runtime.precision:Precision",
)
BACKENDS = _table(
    "backends",
    "backend",
    "runtime.backends:Backend",
    eager="graphopt.runtime.backends.eager:Eager",
    inductor="graphopt.runtime.backends.inductor:Inductor",
)

# What preset names stand for: on one rank, and in a job of several.
PRESETS = {"auto": ("cleanup", "cleanup,schedule,group_gradients")}
# What `graphopt plan` plans where no spec is given.
PLANNED = "group_gradients"


@dataclass(frozen=True)
class _Entry:
    value: str
    origin: str


def names(table: Table = PASSES) -> tuple[str, ...]:
    """All names of a table, sorted.

    Raises:
        PluginError: two distributions offer one of the same name.
    """
    return tuple(sorted(_entries(table)))


def origins(table: Table = PASSES) -> dict[str, str]:
    """Where each comes from: ``"built-in"``, or a distribution with its version.

    Raises:
        PluginError: two distributions offer one of the same name.
    """
    return {name: _entries(table)[name].origin for name in names(table)}


def get(name: str, table: Table = PASSES) -> type[Any]:
    """The class with this name.

    Raises:
        SpecError: there is none.
        PluginError: it cannot be imported, is of another kind or has another name; or two
            distributions offer one of the same name.
    """
    entries = _entries(table)
    if name not in entries:
        raise SpecError(f"unknown {table.what} {name!r}", hint=_near(name, table))
    entry = entries[name]
    if entry.origin == "built-in":
        found = _load(entry.value)
    else:
        try:
            found = _load(entry.value)
        except Exception as error:
            raise PluginError(
                f"{table.what} {name!r} of {entry.origin} cannot be imported: {error!r}",
                where=entry.value,
                hint="repair or uninstall that package",
            ) from error
    base = _load(table.base)
    assert isinstance(base, type)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"{entry.value} of {entry.origin} is not a subclass of {base.__name__}")
    declared = getattr(found, "name", None)
    if declared != name:
        raise PluginError(
            f"{entry.origin} offers a {table.what} as {name!r} whose class says its name is "
            f"{declared!r}",
            where=entry.value,
            hint="make the entry point's name and the class's `name` equal",
        )
    return found


def _near(name: str, table: Table) -> str:
    near = difflib.get_close_matches(name, _entries(table), n=3)
    start = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if table is PASSES:
        return f"{start}`graphopt passes` lists all passes"
    known = ", ".join(names(table))
    return f"{start}known are {known}; a package adds one as an entry point of {table.group!r}"


def _load(value: str) -> object:
    module, _, attribute = value.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _entries(table: Table) -> Mapping[str, _Entry]:
    return _entries_on(table, tuple(sys.path))


@lru_cache(maxsize=16)
def _entries_on(table: Table, path: tuple[str, ...]) -> Mapping[str, _Entry]:
    """The table for one `sys.path`, which is what the search for entry points depends on."""
    found = {name: _Entry(value, "built-in") for name, value in table.built_in}
    for point in entry_points(group=table.group):
        distribution = point.dist
        origin = f"{distribution.name} {distribution.version}" if distribution else "unknown"
        if point.name in found:
            raise PluginError(
                f"two {'passes' if table is PASSES else table.what + 's'} have the name "
                f"{point.name!r}: one is {found[point.name].origin}, the other is from {origin}",
                where=point.value,
                hint=f"uninstall one of them, or rename its entry point in the group "
                f"{table.group!r}",
            )
        found[point.name] = _Entry(point.value, origin)
    return found
