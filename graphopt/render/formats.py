"""Which operators run in which format, layer by layer, for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphopt.analysis.accuracy import LayerError
from graphopt.analysis.formats import FormatStory
from graphopt.passbase import Outcome, Row
from graphopt.render.units import count, size

ROWS_SHOWN = 80
FRONT_SHOWN = 8


def formats_view(outcome: Outcome, name: str, errors: Sequence[LayerError] = ()) -> RenderableType:
    """The products layer by layer, all other operators by kind, totals, the front.

    Args:
        outcome: of the pass that chose.
        name: of the model.
        errors: what each layer moves alone, where that was asked for.
    """
    rows = [dict(row) for row in outcome.tables.get("operators", ())]
    if not rows:
        said = [f"{escape(d.site)}: {d.reason}, {escape(d.detail)}" for d in outcome.declined]
        done = Counter(applied.what for applied in outcome.applied)
        did = [f"{number} x {escape(what)}" for what, number in done.most_common()]
        return Group(f"[bold]{escape(name)}[/]: nothing to choose", *did, *said)
    totals = next(iter(outcome.tables.get("totals", ())), None)
    parts: list[RenderableType] = [_layers(rows, str(totals["format"]) if totals else "low")]
    others = _others(rows)
    if others:
        parts += [Text(), others]
    if errors:
        parts += [Text(), _errors(errors)]
    front = outcome.tables.get("front", ())
    if front:
        parts += [Text(), _front(front)]
    if totals is not None:
        parts += [Text(), _facts(totals)]
    return Group(*parts)


def story_view(story: FormatStory) -> RenderableType:
    """What became of the format of one value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    before = story.before or "not there"
    table.add_row("format", f"{before} as captured, {story.after or 'gone'} now")
    if story.why:
        table.add_row("its operator", escape(story.why))
    for cast, format in story.casts.items():
        table.add_row("cast", f"{escape(cast)} to {format}")
    for reading in story.readings:
        through = f" through {reading.cast}" if reading.cast else ""
        why = f"; {reading.why}" if reading.why else ""
        read = f"in {reading.format}" if reading.format else "by its shape"
        words = f"{reading.node}  {reading.operator}  {read}{through}{why}"
        table.add_row(f"read {reading.phase}", escape(words))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in columns:
        left = title in ("layer", "operator", "format", "because", "bound")
        # Names break where room is short; figures are whole or not there.
        table.add_column(
            title,
            justify="left" if left else "right",
            no_wrap=title not in ("layer", "operator", "because"),
            overflow="fold",
        )
    return table


def _layers(rows: Sequence[dict[str, Any]], low: str) -> RenderableType:
    shown = [row for row in rows if row["kind"] == "allow" or row["flops"]]
    calibrated = any(row["change"] is not None for row in rows)
    titles = ["layer", "operator", "float32 ms", f"{low} ms", "error"]
    titles += ["change", "bound", "format", "because"] if calibrated else ["bound", "format"]
    table = _table(*titles, *([] if calibrated else ["because"]))
    before: str | None = None  # the root is "", and is named, too
    for row in shown[:ROWS_SHOWN]:
        cells = [
            "" if row["module"] == before else row["module"] or "(root)",
            f"{_short(row['operator'])}{'' if row['phase'] == 'forward' else ' (backward)'}",
            _ms(row["float32_us"]),
            _ms(row["low_us"]),
            _small(row["error"]),
            *([_small(row["change"])] if calibrated else []),
            row["bound"] or "",
            row["format"],
            row["reason"],
        ]
        table.add_row(*map(escape, cells))
        before = row["module"]
    hidden = len(shown) - ROWS_SHOWN
    if hidden > 0:
        return Group(table, f"[dim]and {hidden} more, which --json shows[/]")
    return table


def _others(rows: Sequence[dict[str, Any]]) -> RenderableType | None:
    """Operators without products, counted."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["kind"] != "allow" and not row["flops"]:
            key = (row["operator"], row["format"], row["reason"])
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return None
    table = _table("operator", "count", "format", "because")
    for (operator, format, reason), number in sorted(counts.items(), key=lambda c: -c[1]):
        table.add_row(escape(_short(operator)), str(number), format, reason)
    return table


def _errors(errors: Sequence[LayerError]) -> RenderableType:
    table = _table("layer", "operators", "output moves", "gradients move")
    for error in errors:
        cells = (_small(error.output, "not finite"), _small(error.gradient, "not finite"))
        table.add_row(escape(error.layer or "(root)"), str(error.operators), *cells)
    return table


def _front(front: Sequence[Row]) -> RenderableType:
    table = _table("step ms", "change", "lowered", "chosen")
    step = max(1, -(-len(front) // FRONT_SHOWN))
    last = len(front) - 1
    for index, row in enumerate(front):
        if index % step == 0 or index == last or row["chosen"]:
            mark = "*" if row["chosen"] else ""
            seconds, change = _number(row["seconds"]), _number(row["change"])
            table.add_row(_ms(1e6 * seconds), _small(change), str(row["lowered"]), mark)
    return table


def _facts(totals: Row) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, words in _lines(totals):
        table.add_row(key, escape(words))
    return table


def _lines(totals: Row) -> Iterator[tuple[str, str]]:
    of = {key: _number(value) for key, value in totals.items() if not isinstance(value, str)}
    yield "operators", f"{totals['lowered']} of {totals['operators']} that can be lowered"
    yield "FLOPs", f"{of['flops_lowered']:.1%} of {count(of['flops'])} in {totals['format']}"
    yield "casts", f"{totals['casts']}, {size(of['cast_bytes'])} read and written"
    before, after = of["saved_before"], of["saved_after"]
    yield "saved", f"{size(before)} for backward in float32, {size(after)} now"
    times = {
        "measured": "measured on this device, operator by operator",
        "kept": "measured on this device in an earlier run",
        "roofline": "roofline of an assumed device; not measured",
    }
    if totals["float32_us"] is None:
        yield "time", "not asked for: the format is emulated, so nothing gets faster"
        return
    yield (
        "time",
        f"{_ms(of['float32_us'])} ms in float32, {_ms(of['chosen_us'])} ms as chosen, casts "
        f"included: {times.get(str(totals['times']), '')}",
    )
    yield "bound", "by the arithmetic intensity in float32 on an assumed device of this class"
    if totals["change"] is not None:
        budget = f", of a budget of {of['budget']:.3g}" if totals["budget"] else ""
        yield "loss", f"expected to change by {of['change']:.3g}{budget}"


def _short(operator: str) -> str:
    return operator.removeprefix("aten.").removesuffix(".default")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _ms(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds / 1e3:.3g}"


def _small(value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.2g}"
