"""What weights could be made of, layer by layer, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphopt.passbase import Outcome
from graphopt.render.units import duration


def weights_view(outcome: Outcome, name: str) -> RenderableType:
    """A row per weight and form, then what stays dense with the reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("weight", "form", "step", "error", "memory", ""):
        left = title in ("weight", "form", "")
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    before, dense = "", 1.0
    for row in outcome.tables.get("weights", ()):
        if row["form"] == "dense":
            dense = float(row["numbers"] or 1)
        cells = [
            "" if row["site"] == before else str(row["site"]),
            str(row["form"]),
            "-" if row["seconds"] is None else duration(float(row["seconds"])),
            f"{float(row['error'] or 0):.1e}" if row["error"] else "0",
            f"{float(row['numbers'] or 0) / dense:.0%}",
            str(row["why"]),
        ]
        table.add_row(*map(escape, cells))
        before = str(row["site"])
    parts: list[RenderableType] = [Text(name, style="bold")]
    if table.row_count:
        parts.append(table)
    for site in outcome.declined:
        figures = _figures(site.numbers)
        parts.append(Text(f"{site.site} stays dense: {site.reason}, {site.detail}{figures}"))
    if not outcome.applied and not outcome.declined:
        parts.append(Text("it multiplies with no weight"))
    return Group(*parts)


def _figures(numbers: Mapping[str, object]) -> str:
    said = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in numbers.items()
    )
    return f" ({said})" if said else ""
