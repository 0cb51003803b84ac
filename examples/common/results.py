"""Values, criteria and tables of a run, as JSON and on the screen."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Value = float | int | str


@dataclass(frozen=True)
class Criterion:
    """A claim about one number.

    Attributes:
        name: what the number is, with its unit.
        value: the number.
        relation: ``<=`` or ``>=``.
        bound: what the number is held against.
        gate: part of what the workload promises; others are for information. What fails is shown
            as failed, and the program ends like any other that has run to its end.
    """

    name: str
    value: float
    relation: str
    bound: float
    gate: bool = True

    @property
    def holds(self) -> bool:
        """Whether the claim is true; NaN never is."""
        if self.relation == "<=":
            return self.value <= self.bound
        return self.value >= self.bound


@dataclass
class Results:
    """What a run leaves in ``results.json``."""

    workload: str
    settings: Mapping[str, Value]
    criteria: list[Criterion] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Value]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write all of it with date and versions."""
        record: dict[str, Any] = {
            "workload": self.workload,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "settings": dict(self.settings),
            "criteria": [{**asdict(c), "holds": c.holds} for c in self.criteria],
            "values": self.values,
            "tables": self.tables,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }
        path.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")

    def show(self, console: Console) -> None:
        """Print tables, then criteria."""
        for title, rows in self.tables.items():
            if rows:
                table = Table(*rows[0], title=title, title_justify="left")
                for row in rows:
                    table.add_row(*(_text(value) for value in row.values()))
                console.print(table)
        table = Table("criterion", "value", "bound", "", title="criteria", title_justify="left")
        for c in self.criteria:
            verdict = "holds" if c.holds else "[red]FAILS[/red]"
            table.add_row(
                c.name,
                _text(c.value),
                f"{c.relation} {_text(c.bound)}",
                verdict if c.gate else f"{verdict} (for information)",
            )
        console.print(table)


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
