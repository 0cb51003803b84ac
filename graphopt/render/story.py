"""One parameter or node, and what every pass decided about it, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from graphopt.analysis.story import Link, Story
from graphopt.pipeline.step import PassStep
from graphopt.render.steps import numbers_text
from graphopt.render.units import count, size

USERS_SHOWN = 8


def story_view(told: Story, decisions: Sequence[PassStep], *, removed: bool) -> RenderableType:
    """The story as lines of fact, then one line per decision.

    Args:
        told: what the graph says.
        decisions: one step per pass, with only those sites that are about `told`.
        removed: whether a pass removed the node.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    here = f"{Path.cwd()}/"
    for key, text in _facts(told):
        table.add_row(key, escape(text.replace(here, "")))
    if removed:
        table.add_row("removed", "by the passes below")
    for step in decisions:
        for verdict in _verdicts(step, told):
            table.add_row("pass", f"[bold]{escape(step.spec)}[/]: {verdict}")
    return Group(f"[bold]{escape(told.name)}[/]  {told.what}", table)


def _facts(told: Story) -> Iterator[tuple[str, str]]:
    yield "type", told.type
    if told.operator:
        yield "operator", f"{told.operator}, {told.phase}"
    if told.node != told.name:
        yield "node", told.node
    if told.module:
        yield "module", f"{told.module} {told.kind}".rstrip()
    if told.source:
        yield "source", told.source
    yield from (("reads", _link(link, told)) for link in told.producers)
    for half in ("forward", "backward"):
        links = [link for link in told.users if link.phase == half]
        yield from ((f"used {half}", _link(link, told)) for link in links[:USERS_SHOWN])
        if len(links) > USERS_SHOWN:
            yield f"used {half}", f"and by {len(links) - USERS_SHOWN} more"
    yield from (("returned as", output) for output in told.outputs)
    if told.gradient:
        g = told.gradient
        yield "gradient", f"{g.node}, from {g.operator}"
        yield "ready", f"operator {g.position} of {g.of} in backward; needs {g.needs} of them"
    if told.flops:
        yield "FLOPs", count(told.flops)
    if told.bytes:
        yield "bytes", f"{size(told.bytes)} read and written"
    if told.saved:
        yield "saved", f"{size(told.saved)} kept for backward"


def _link(link: Link, told: Story) -> str:
    """A neighbour, with its source line unless that was told already."""
    source = f"  {link.source}" if link.source not in ("", told.source) else ""
    return f"{link.node}  {link.operator}{source}"


def _verdicts(step: PassStep, told: Story) -> Iterator[str]:
    if step.skipped:
        yield f"[yellow]skipped[/], {escape(step.skipped)}"
        return
    for applied in step.outcome.applied:
        site = _site(applied.site, told)
        yield f"[green]applied[/] {site}{escape(applied.what)}{numbers_text(applied.numbers)}"
    for declined in step.outcome.declined:
        words = f"{declined.reason}: {escape(declined.detail)}{numbers_text(declined.numbers)}"
        yield f"[yellow]declined[/] {_site(declined.site, told)}{words}"
    if not (step.outcome.applied or step.outcome.declined):
        yield "no candidate here"


def _site(site: str, told: Story) -> str:
    return "" if site in (told.name, told.node) else f"{escape(site)}: "
