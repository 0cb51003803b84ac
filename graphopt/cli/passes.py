"""`graphopt passes`: what can be written in a spec."""

from __future__ import annotations

import inspect
import json as jsonlib
from dataclasses import MISSING
from importlib.resources import files
from typing import TYPE_CHECKING

import typer

from graphopt.cli.console import show, show_json
from graphopt.cli.options import Json

BUILT_IN = "built_in_passes.json"
"""Written by ``docs/generate_passes.py``: to ask the passes themselves would import torch."""

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.passbase import Pass


def passes(json: Json = False) -> None:
    """List every pass: options, numerics, what it requires and provides, where it comes from.

    JSON: passes, a list of {name, origin, summary, numerics, levels, requires, provides,
    conflicts, changes_signature, source, options: [{name, type, default, required}]}, where a
    default is written as in a spec; a pass that cannot be loaded is {name, origin, error}, and
    the exit code 1.
    """
    from graphopt import registry
    from graphopt.errors import GraphoptError

    known = built_in()
    found: list[dict[str, object]] = []
    for name, origin in registry.origins().items():
        entry: dict[str, object] = {"name": name, "origin": origin}
        try:
            entry |= known[name] if name in known else describe(registry.get(name))
        except GraphoptError as error:
            entry["error"] = str(error)
        found.append(entry)
    if json:
        show_json("passes", {"passes": found})
    else:
        show(*(_block(entry) for entry in found))
    if any("error" in entry for entry in found):
        raise typer.Exit(1)


def built_in() -> dict[str, dict[str, object]]:
    """What is written about graphopt's own passes, by name."""
    found: dict[str, dict[str, object]] = jsonlib.loads(
        files("graphopt.cli").joinpath(BUILT_IN).read_text(encoding="utf-8")
    )
    return found


def describe(kind: type[Pass]) -> dict[str, object]:
    """What can be said of a pass, as plain data."""
    from graphopt.passbase import Numerics
    from graphopt.pipeline.spec import options_of
    from graphopt.pipeline.values import describe as words_of
    from graphopt.pipeline.values import format_value

    # An option may decide the numerics; on the class they are then a property.
    declared: object = kind.numerics
    options = [
        {
            "name": option.name,
            "type": words_of(option.kind),
            "required": option.default is MISSING,
            "default": None
            if option.default is MISSING
            else format_value(option.default, option.kind),
        }
        for option in options_of(kind)
    ]
    return {
        "summary": (inspect.getdoc(kind) or "").partition("\n")[0],
        "numerics": str(declared) if isinstance(declared, Numerics) else "by option",
        "levels": sorted(kind.levels),
        "requires": sorted(kind.requires),
        "provides": sorted(kind.provides),
        "conflicts": sorted(kind.conflicts),
        "changes_signature": kind.changes_signature,
        "source": kind.source,
        "options": options,
    }


def _block(entry: dict[str, object]) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.title = f"[bold]{entry['name']}[/]  [dim]{entry['origin']}[/]"
    table.title_justify = "left"
    for key, value in entry.items():
        if key in ("name", "origin", "options") or value in ("", [], False):
            continue
        words = ", ".join(value) if isinstance(value, list) else str(value)
        table.add_row(f"  {key.replace('_', ' ')}", words.replace("[", r"\["))
    options = entry.get("options", [])
    assert isinstance(options, list)
    for option in options:
        default = "required" if option["required"] else f"default {option['default'] or repr('')}"
        table.add_row("  option", f"[bold]{option['name']}[/]: {option['type']}, {default}")
    return table
