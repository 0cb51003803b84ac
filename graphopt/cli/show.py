"""`graphopt show`: the graph by module."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.console import phase, save, show_json, show_text
from graphopt.cli.console import show as show_answer
from graphopt.cli.options import Json, ModelName, NoGrad, OptionalPasses


def show(
    model: ModelName,
    passes: OptionalPasses = None,
    depth: Annotated[
        int | None,
        typer.Option(min=0, help="Levels of modules to show; by default what fits a screen."),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the graph as .gopt text.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the graph as HTML.")
    ] = None,
    level: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="forward: what the model calls, function by function, before there is a backward; "
            "shown as text.",
            show_default=False,
        ),
    ] = "",
    no_grad: NoGrad = False,
    json: Json = False,
) -> None:
    """Show the graph of M by module: operators, shapes, parameters, FLOPs, bytes, activations.

    Operators are written forward+backward. Bytes are those an unfused execution moves; saved are
    the activations that a module computes and backward reads. Equal neighbours share one line.

    JSON: model, level, passes, peak_bytes, and modules, a tree of {path, kind, output, parameters,
    forward: {ops, flops, bytes}, backward: {ops, flops, bytes}, saved, children}; of a forward
    graph text in place of the last two.
    """
    with phase("importing torch"):
        from graphopt.analysis.liveness import liveness
        from graphopt.analysis.summary import summary
        from graphopt.cli.subject import load_subject, rewrite
    from graphopt.errors import ArgumentError
    from graphopt.graph import Level
    from graphopt.render.html import graph_html
    from graphopt.render.text import GraphTable
    from graphopt.text import print_graph

    if level not in ("", "forward"):
        raise ArgumentError(f"--level {level} is unknown", hint="--level forward, or leave it out")
    subject = load_subject(model, no_grad=no_grad, forward=level == "forward")
    graph = rewrite(subject, passes)[0] if passes else subject.graph
    if graph.level is Level.FORWARD:
        if html is not None:
            raise ArgumentError("a forward graph has no HTML", hint="leave --html or --level out")
        written = print_graph(graph)
        if json:
            said = {"model": subject.name, "level": "forward", "passes": passes or ""}
            show_json("show", {**said, "text": written})
        else:
            show_text(written)
        return
    if html is not None:
        save(html, graph_html(graph, subject.name))
    if json:
        answer = {
            "model": subject.name,
            "level": str(graph.level),
            "passes": passes or "",
            "peak_bytes": graph.get(liveness).peak,
            "modules": asdict(graph.get(summary)),
        }
        show_json("show", answer)
    elif text:
        show_text(print_graph(graph))
    else:
        show_answer(GraphTable(graph, subject.name, depth))
