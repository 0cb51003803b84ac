"""Text for terminals and pipes, as `rich` renderables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.analysis.liveness import liveness
from graphopt.analysis.summary import Half, Summary, summary
from graphopt.graph import Graph
from graphopt.render.rows import Row, fitting_depth, rows
from graphopt.render.units import count, size

SCREEN = 40


def graph_table(graph: Graph, name: str, depth: int | None = None) -> RenderableType:
    """The modules of `graph` with their figures, and totals.

    Args:
        graph: any graph.
        name: what to call the whole model.
        depth: levels of modules to show; by default as many as fit a screen.
    """
    root = rows(graph.get(summary), name)
    if depth is None:
        depth = fitting_depth(root, SCREEN)
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("module", overflow="fold")
    table.add_column("output", overflow="fold")
    for title in ("params", "ops", "FLOPs", "bytes", "saved"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in root.walk(depth):
        table.add_row(_label(row), row.summary.output, *_figures(row.summary))
    return Group(table, Text(), _totals(graph))


def _label(row: Row) -> Text:
    label = Text("  " * row.level + row.label, style="bold" if row.level == 0 else "")
    if row.summary.kind:
        label.append(f" {row.summary.kind}", style="dim")
    if row.times > 1:
        label.append(f" x{row.times}, each", style="cyan")
    return label


def _figures(figures: Summary) -> tuple[str, ...]:
    forward, backward = figures.forward, figures.backward
    return (
        count(figures.parameters),
        f"{forward.ops}+{backward.ops}" if backward.ops else str(forward.ops),
        count(forward.flops + backward.flops),
        size(forward.bytes + backward.bytes),
        size(figures.saved),
    )


def _totals(graph: Graph) -> RenderableType:
    root = graph.get(summary)
    live = graph.get(liveness)
    table = Table.grid(padding=(0, 2))
    table.add_row("forward", _half(root.forward))
    if root.backward.ops:
        table.add_row("backward", _half(root.backward))
    if live.saved_bytes:
        table.add_row("saved", f"{size(live.saved_bytes)} of activations, at most, for backward")
    if live.peak_at is not None:
        peak = f"{size(live.peak)} beside inputs and parameters, at {live.peak_at.name}"
        table.add_row("peak", peak)
    return table


def _half(half: Half) -> str:
    return f"{half.ops} ops, {count(half.flops)} FLOP, {size(half.bytes)} moved"
