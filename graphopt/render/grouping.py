"""A plan of gradient groups and its baselines, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphopt.plan.grouping import Grouping
from graphopt.render.units import size

GROUPS_SHOWN = 40


def grouping_view(grouping: Grouping, *, link_note: str = "", compute: str = "") -> RenderableType:
    """The groups, the candidates, the certificate, and where the times come from.

    Args:
        grouping: a plan with at least one group; its times are predictions.
        link_note: who chose the link, and what about it is assumed.
        compute: what is known about the times of compute beside where they come from.
    """
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for key, words in _facts(grouping, link_note, compute):
        facts.add_row(key, escape(words))
    return Group(_groups(grouping), Text(), _candidates(grouping), Text(), facts)


def above_bound(grouping: Grouping) -> float:
    """By which fraction of the lower bound the plan finishes later; 0 for a bound of 0."""
    return max(0.0, grouping.finish / grouping.bound - 1) if grouping.bound > 0 else 0.0


def _groups(grouping: Grouping) -> RenderableType:
    kinds = {group.kind for group in grouping.groups}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("group", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("first", overflow="fold")
    table.add_column("last", overflow="fold")
    if len(kinds) > 1:
        table.add_column("kind", no_wrap=True)
    table.add_column("ready ms", justify="right", no_wrap=True)
    table.add_column("finish ms", justify="right", no_wrap=True)
    for number, group in enumerate(grouping.groups[:GROUPS_SHOWN], start=1):
        table.add_row(
            str(number),
            str(len(group.names)),
            size(group.bytes),
            escape(group.names[0]),
            escape(group.names[-1]),
            *([group.kind] if len(kinds) > 1 else []),
            _ms(group.ready),
            _ms(group.finish),
        )
    hidden = len(grouping.groups) - GROUPS_SHOWN
    if hidden > 0:
        return Group(table, f"[dim]and {hidden} more, which --json shows[/]")
    return table


def _candidates(grouping: Grouping) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plan", overflow="fold")
    for title in ("groups", "finish ms", "exposed ms"):
        table.add_column(title, justify="right", no_wrap=True)
    chosen = Text("this plan", style="bold")
    table.add_row(chosen, str(len(grouping.groups)), _ms(grouping.finish), _ms(grouping.exposed))
    for other in sorted(grouping.candidates, key=lambda c: c.finish):
        exposed = max(0.0, other.finish - grouping.backward)
        table.add_row(escape(other.name), str(len(other.sizes)), _ms(other.finish), _ms(exposed))
    return table


def _facts(grouping: Grouping, link_note: str, compute: str) -> Iterator[tuple[str, str]]:
    yield "backward", f"{_ms(grouping.backward)} ms without communication"
    yield (
        "bound",
        f"{_ms(grouping.bound)} ms: no contiguous groups can finish earlier where a message "
        f"costs no more than its parts do; this plan is {100 * above_bound(grouping):.2f} % above",
    )
    yield "times", f"predicted; compute: {compute or grouping.times or 'unknown'}"
    note = f" ({link_note})" if link_note else ""
    yield "link", f"{grouping.link or 'unknown'}, {grouping.world} ranks{note}"


def _ms(seconds: float) -> str:
    """Milliseconds down to one microsecond, so that a column lines up."""
    return f"{seconds * 1e3:.3f}"
