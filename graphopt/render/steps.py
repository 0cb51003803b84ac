"""What passes did, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from graphopt.passbase import Applied, Declined, Number
from graphopt.render.units import duration
from graphopt.report import Step

SITES_SHOWN = 4


def step_view(step: Step, change: RenderableType | None = None) -> RenderableType:
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
    parts += [_group("applied", "green", what, sites) for what, sites in applied.items()]
    parts += [_group("declined", "yellow", why, sites) for why, sites in declined.items()]
    if not (applied or declined):
        parts.append("  no candidate in this graph")
    return Group(*parts, Text())


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
