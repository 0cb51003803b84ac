"""Text for terminals and pipes, as `rich` renderables."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from graphopt.analysis.liveness import liveness
from graphopt.analysis.summary import Summary, Totals, summary
from graphopt.graph import Graph
from graphopt.render.rows import Row, fitting_depth, rows
from graphopt.render.units import count, size

SCREEN = 40


TITLES = ("params", "ops", "FLOPs", "bytes", "saved")


@dataclass(frozen=True)
class GraphTable:
    """The modules of a graph with their figures, and totals, as wide as the console allows.

    Attributes:
        graph: any graph.
        name: what to call the whole model.
        depth: levels of modules to show; None for as many as fit a screen.
    """

    graph: Graph
    name: str
    depth: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What `rich` prints."""
        root = rows(self.graph.get(summary), self.name)
        depth = fitting_depth(root, SCREEN) if self.depth is None else self.depth
        lines = list(root.walk(depth))
        figures = [_figures(row.summary) for row in lines]
        columns = zip(TITLES, *figures, strict=True)
        room = options.max_width - sum(max(map(len, column)) + 1 for column in columns)
        table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
        table.add_column("module", width=_label_width(lines, room), no_wrap=True)
        table.add_column("output", overflow="fold")
        for title in TITLES:
            table.add_column(title, justify="right", no_wrap=True)
        for row, cells in zip(lines, figures, strict=True):
            table.add_row(_label(row), row.summary.output, *cells)
        yield table
        yield Text()
        yield _totals(self.graph)


def _label_width(lines: list[Row], room: int) -> int:
    """On a narrow console, class names are cut, but not module names."""
    output = max(len(row.summary.output) for row in lines) + 1
    names = max(len(_name(row)) for row in lines)
    longest = max(len("module"), *(len(_label(row)) for row in lines))
    return min(longest, max(names, room - output))


def _name(row: Row) -> str:
    times = f" (x{row.times}, each)" if row.times > 1 else ""
    return "  " * row.level + row.label + times


def _label(row: Row) -> Text:
    label = Text(_name(row), style="" if row.level else "bold")
    if row.summary.kind:
        label.append(f" {row.summary.kind}", style="dim")
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


def _half(half: Totals) -> str:
    return f"{half.ops} ops, {count(half.flops)} FLOP, {size(half.bytes)} moved"
