"""`graphopt verify --padding`: does padding change what M computes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import typer

from graphopt.cli.console import phase, show, show_json
from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.data import Pad, PaddingReport


def run(
    model: str, pads: list[str], side: Literal["right", "left"], *, no_grad: bool, json: bool
) -> None:
    """Check M, show the answer, and exit with 1 if padding changes something.

    Args:
        model: the argument M.
        pads: ``NAME=DIM[:VALUE]`` for each argument that is padded; empty to have them found.
        side: where padding goes.
        no_grad: evaluation mode, without gradients.
        json: show JSON.

    Raises:
        ArgumentError: M is a graph, an item of `pads` cannot be read, or as in
            `graphopt.data.check_padding`.
    """
    if model.endswith(".gopt"):
        raise ArgumentError(
            "a .gopt file is a graph for one length, which cannot be padded",
            hint="name the model as path.py:FACTORY",
        )
    with phase("importing torch"):
        from graphopt.cli.model import load_example
        from graphopt.cli.subject import mode
        from graphopt.data import check_padding
    chosen = dict(_pad(text, side) for text in pads)
    with phase(f"making {model}"):
        example = load_example(model)
    with phase(f"running {example.name}"), mode(example, no_grad=no_grad):
        report = check_padding(
            example.model, example.args, example.kwargs, pads=chosen or None, side=side
        )
    if json:
        show_json("verify", _answer(example.name, report))
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _pad(text: str, side: Literal["right", "left"]) -> tuple[str, Pad]:
    from graphopt.data import Pad

    name, _, rest = text.partition("=")
    dims, _, value = rest.partition(":")
    try:
        if not name:
            raise ValueError("no name")
        dim = tuple(int(d) for d in dims.split(","))
        return name, Pad(float(value or 0), dim=dim, side=side)
    except ValueError as error:
        raise ArgumentError(
            f"--pad {text!r} cannot be read",
            hint="write NAME=DIM or NAME=DIM:VALUE, such as ids=1 or labels=1:-100",
        ) from error


def _answer(name: str, report: PaddingReport) -> dict[str, object]:
    return {
        "model": name,
        "ok": report.ok,
        "padded": {
            n: {"value": pad.value, "dim": list(pad.dims), "side": pad.side}
            for n, pad in report.padded.items()
        },
        "length": report.length,
        "more": report.more,
        "allowed": report.allowed,
        "compared": [asdict(compared) for compared in report.compared],
        "leaks": [asdict(leak) for leak in report.leaks],
    }


def _show(report: PaddingReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    show(escape(f"{report.how()}\n"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("what", "error", "allowed", "result"):
        table.add_column(title, overflow="fold")
    for compared in report.compared:
        bad = compared.error > report.allowed
        result = "[red]changes[/]" if bad else "[green]the same[/]"
        worst = f", worst {escape(compared.worst)}" if bad else ""
        table.add_row(
            compared.kind, f"{compared.error:.2g}", f"{report.allowed:.2g}", f"{result}{worst}"
        )
    show(table)
    for leak in report.leaks:
        show(f"\n[bold]{escape(leak.operator)}[/] {escape(leak.says)}")
        show(escape(f"  {leak.place}"))
    if report.hint:
        show(f"\n{report.hint}")
