"""Predicted steps over many machine sizes, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from graphopt.simulate import Point

COLUMNS = ("world", "groups", "step ms", "exposed ms", "efficiency", "DDP default")


def scaling_view(
    points: Sequence[Point], ddp: Sequence[Point], assumptions: Sequence[tuple[str, str]]
) -> RenderableType:
    """One row per machine size, then the assumptions behind the figures.

    Args:
        points: the plan's predicted steps.
        ddp: those of DistributedDataParallel's default, for the same sizes.
        assumptions: topic and words.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for ours, theirs in zip(points, ddp, strict=True):
        table.add_row(
            f"{ours.world:,}",
            str(ours.groups),
            f"{ours.step * 1e3:.4f}",
            f"{ours.exposed * 1e3:.4f}",
            f"{100 * ours.efficiency:.2f} %",
            f"{100 * theirs.efficiency:.2f} %",
        )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for topic, words in assumptions:
        facts.add_row(topic, escape(words))
    return Group(table, Text(), Text("predicted, under these assumptions:"), facts)
