"""What passes did, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from graphopt.passbase import Applied, Declined, Number
from graphopt.pipeline.step import PassStep
from graphopt.render.units import duration

SITES_SHOWN = 4
GROUPS_SHOWN = 8


def step_view(step: PassStep, change: RenderableType | None = None) -> RenderableType:
    """One pass: what it took, what it changed, what it applied and declined.

    Args:
        step: what happened.
        change: the difference that it made, already rendered.
    """
    if step.skipped:
        return f"[bold]{escape(step.spec)}[/]  [yellow]skipped[/], {escape(step.skipped)}"
    parts: list[RenderableType] = [
        f"[bold]{escape(step.spec)}[/]  {step.nodes_before} → {step.nodes_after} nodes, "
        f"{step.numerics}, {duration(step.seconds)}, checked in {duration(step.verify_seconds)}"
    ]
    if change is not None:
        parts.append(Padding(change, (0, 0, 0, 2), expand=False))
    applied: dict[str, list[Applied | Declined]] = {}
    for site in step.outcome.applied:
        applied.setdefault(site.what, []).append(site)
    declined: dict[str, list[Applied | Declined]] = {}
    for refusal in step.outcome.declined:
        declined.setdefault(f"{refusal.reason}: {refusal.detail}", []).append(refusal)
    parts += _groups("applied", "green", applied)
    parts += _groups("declined", "yellow", declined)
    if not (applied or declined):
        parts.append("  no candidate in this graph")
    return Group(*parts, Text())


def _groups(
    verdict: str, colour: str, groups: Mapping[str, Sequence[Applied | Declined]]
) -> Iterator[RenderableType]:
    for what in list(groups)[:GROUPS_SHOWN]:
        yield _group(verdict, colour, what, groups[what])
    if len(groups) > GROUPS_SHOWN:
        rest = sum(len(sites) for sites in list(groups.values())[GROUPS_SHOWN:])
        yield f"  [{colour}]{verdict}[/] {rest} more, which --json shows"


def numbers_text(numbers: Mapping[str, Number]) -> str:
    """Figures of one site: ``" (bytes=4096, ratio=0.5)"``; empty for none."""
    parts = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in numbers.items()
    )
    text = ", ".join(parts)
    return f" ({escape(text)})" if text else ""


def _group(
    verdict: str, colour: str, what: str, sites: Sequence[Applied | Declined]
) -> RenderableType:
    shown = ", ".join(escape(s.site) + numbers_text(s.numbers) for s in sites[:SITES_SHOWN])
    more = f" and {len(sites) - SITES_SHOWN} more" if len(sites) > SITES_SHOWN else ""
    times = f"{len(sites)}x " if len(sites) > 1 else ""
    line = f"[{colour}]{verdict}[/] {times}{escape(what)}: [dim]{shown}{more}[/]"
    return Padding(line, (0, 0, 0, 2), expand=False)
