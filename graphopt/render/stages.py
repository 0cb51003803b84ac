"""The stages of a pipeline, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphopt.render.units import size

CROSSINGS_SHOWN = 40

Data = Mapping[str, Any]


def stages_view(data: Data, name: str) -> RenderableType:
    """Stages by module, what crosses each cut, the simulated step, the certificate.

    Args:
        data: the plan part, as JSON has it.
        name: of the model.
    """
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for key, words in _facts(data):
        facts.add_row(key, escape(words))
    title = f"[bold]{escape(name)}[/]: {len(data['stages'])} stages on {data['ranks']} ranks"
    return Group(title, Text(), _stages(data), Text(), _crossings(data), Text(), facts)


def _stages(data: Data) -> RenderableType:
    table = _table("stage", "rank", "modules", "parameters", "forward ms", "backward ms", "memory")
    table.add_column("in flight", justify="right", no_wrap=True)
    for number, stage in enumerate(data["stages"]):
        table.add_row(
            str(number),
            str(stage["rank"]),
            escape(_short(stage["modules"])),
            size(stage["parameter_bytes"]),
            _ms(stage["forward"]),
            _ms(stage["input_grad"] + stage["weight_grad"]),
            size(stage["memory"]),
            str(stage["in_flight"]),
        )
    return table


def _crossings(data: Data) -> RenderableType:
    table = _table("cut", "value", "from", "read in", "relayed by", "bytes", "ms")
    crossings = data["crossings"]
    rows = 0
    for cut, border in enumerate(data["cuts"]):
        for back in (False, True):
            shown = [c for c in crossings if c["back"] is back and _crosses(c, cut)]
            seconds = border["backward"] if back else border["forward"]
            for index, crossing in enumerate(shown):
                rows += 1
                if rows > CROSSINGS_SHOWN:
                    continue
                where = f" ({crossing['module']})" if crossing["module"] else ""
                table.add_row(
                    (f"{cut} < {cut + 1}" if back else f"{cut} > {cut + 1}") if index == 0 else "",
                    escape(f"{crossing['name']}{where}"),
                    str(crossing["made"]),
                    _numbers(crossing["read"]),
                    _numbers(crossing["relayed"]),
                    size(crossing["bytes"]),
                    _ms(seconds) if index == 0 else "",
                )
    if rows > CROSSINGS_SHOWN:
        return Group(table, f"[dim]and {rows - CROSSINGS_SHOWN} more, which --json shows[/]")
    return table


def _facts(data: Data) -> Iterator[tuple[str, str]]:
    batches = data["micro_batches"]
    yield "step", f"{_ms(data['step'])} ms simulated, {data['schedule']}, {batches} micro-batches"
    once = "; without flushes that is once per run" if data["schedule"] == "no_flush" else ""
    yield "bubble", f"{100 * data['bubble']:.1f} % of all ranks' time in it{once}"
    value, lower = data["value"], data["lower"]
    if value <= lower:
        proof = f"{_ms(value)} ms, and no other stages have less ({data['proof']})"
    else:
        above = f"at most {100 * (value / lower - 1):.2f} %" if lower > 0 else "unknown how far"
        proof = f"{_ms(value)} ms, {above} above the best ({data['proof']})"
    yield "certificate", f"{data['objective']} {proof}"
    for shared in data["shared"]:
        stages = _numbers(shared["stages"])
        yield "shared", f"{shared['name']} in stages {stages}: gradients added up once per step"
    if data["limit"] is not None:
        yield "limit", f"{size(data['limit'])} per stage"
    times = {
        "measured": "measured on this device, operator by operator",
        "roofline": "roofline, not measured",
    }
    yield "times", f"per micro-batch, which is the call of the example; {times[data['times']]}"
    yield "link", f"{data['link']} (assumed), beside the computation"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in columns:
        left = title in ("modules", "value", "cut", "relayed by", "read in")
        table.add_column(
            title,
            justify="left" if left else "right",
            no_wrap=title not in ("modules", "value"),
            overflow="fold",
        )
    return table


def _crosses(crossing: Data, cut: int) -> bool:
    ends = (crossing["made"], *crossing["read"])
    return bool(min(ends) <= cut < max(ends))


def _short(modules: Sequence[str]) -> str:
    if len(modules) <= 4:
        return ", ".join(modules)
    return f"{modules[0]}, {modules[1]} … {modules[-1]} ({len(modules)} modules)"


def _numbers(stages: Sequence[int]) -> str:
    return " ".join(map(str, stages))


def _ms(seconds: float) -> str:
    """Milliseconds down to one microsecond, so that a column lines up."""
    return f"{seconds * 1e3:.3f}"
