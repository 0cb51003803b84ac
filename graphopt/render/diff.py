"""What differs between two graphs, for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from graphopt.diff import Count, Diff, Family, Kind

_COLOURS = {Kind.ADDED: "green", Kind.REMOVED: "red"}


def diff_view(diff: Diff, *, lines: bool) -> RenderableType:
    """The difference by module; modules with the same changes are one entry.

    Args:
        diff: the difference.
        lines: also show the lines that differ, those of the first module of each entry.
    """
    parts: list[RenderableType] = [Text(diff.headline, style="bold")]
    for family in diff.families:
        number = len(family.modules)
        title = Text(family.path or "(root)")
        if number > 1:
            title.append(f"  ({number} modules)", style="dim")
        parts += [title, *(_count(count) for count in diff.counts(family.modules))]
        if lines:
            parts += _lines(diff, family)
    return Group(*parts)


def _count(count: Count) -> Text:
    return Text(f"  {count}", style=_COLOURS.get(count.kind, "yellow"))


def _lines(diff: Diff, family: Family) -> list[RenderableType]:
    colours = {"+": "green", "-": "red"}
    return [Text(f"      {line}", style=colours[line[0]]) for line in diff.lines(family.modules[0])]
