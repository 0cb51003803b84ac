"""What one method has decided, for a terminal, whatever method it is."""

from __future__ import annotations

from rich.console import RenderableType
from rich.markup import escape

from graphopt.plan import PlanPart
from graphopt.plan.reading import summary


def part_view(part: PlanPart) -> RenderableType:
    """One line: the numbers and texts of a plan part, and the lengths of its lists."""
    words = ", ".join(f"{key} {value}" for key, value in summary(part).items())
    return f"\n[bold]{escape(part.name)}[/]  {escape(words)}"
