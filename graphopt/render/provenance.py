"""One parameter or node, and what every pass decided about it, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from graphopt.analysis.provenance import Neighbour, Provenance
from graphopt.pipeline.step import PassStep
from graphopt.plan.reading import Mention
from graphopt.render.steps import numbers_text
from graphopt.render.units import count, size

USERS_SHOWN = 8


def provenance_view(
    told: Provenance,
    decisions: Sequence[PassStep],
    planned: Sequence[Mention] = (),
    *,
    removed: bool,
) -> RenderableType:
    """The provenance as lines of fact, then one line per decision.

    Args:
        told: what the graph says.
        decisions: one step per pass, with only those sites that are about `told`.
        planned: where the plan names it.
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
    for mention in planned:
        words = ", ".join(f"{key} {value}" for key, value in mention.values.items() if value != "")
        table.add_row("plan", escape(f"{mention.part} {mention.path}: {words}"))
    return Group(f"[bold]{escape(told.name)}[/]  {told.what}", table)


def _facts(told: Provenance) -> Iterator[tuple[str, str]]:
    yield "type", told.type
    if told.operator:
        yield "operator", f"{told.operator}, {told.phase}"
    if told.node != told.name:
        yield "node", told.node
    if told.module:
        yield "module", f"{told.module} {told.kind}".rstrip()
    if told.source:
        yield "source", told.source
    yield from (("reads", _neighbour(other, told)) for other in told.producers)
    for half in ("forward", "backward"):
        users = [other for other in told.users if other.phase == half]
        yield from ((f"used {half}", _neighbour(other, told)) for other in users[:USERS_SHOWN])
        if len(users) > USERS_SHOWN:
            yield f"used {half}", f"and by {len(users) - USERS_SHOWN} more"
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


def _neighbour(other: Neighbour, told: Provenance) -> str:
    """With its source line, unless that was shown already."""
    source = f"  {other.source}" if other.source not in ("", told.source) else ""
    return f"{other.node}  {other.operator}{source}"


def _verdicts(step: PassStep, told: Provenance) -> Iterator[str]:
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


def _site(site: str, told: Provenance) -> str:
    return "" if site in (told.name, told.node) else f"{escape(site)}: "
