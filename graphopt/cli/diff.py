"""`graphopt diff`: what is different between two graphs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from graphopt.cli.console import phase, show, show_json
from graphopt.cli.options import Json, NoGrad


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model or a .gopt file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one; or with C, a SPEC.")],
    c: Annotated[
        str | None, typer.Argument(metavar="[C]", help="A SPEC, to compare with B on A.")
    ] = None,
    no_grad: NoGrad = False,
    json: Json = False,
) -> None:
    """Compare two graphs by module; exits with 1 where they differ.

    `graphopt diff before.gopt after.gopt` compares two graphs; each can also be a model.

    `graphopt diff M SPEC SPEC` compares what two specs make of one model; '' is no pass at all.

    JSON: a, b, equal, and diff.
    """
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject, rewrite
    from graphopt.diff import diff as compare
    from graphopt.render.diff import diff_view

    first = load_subject(a, no_grad=no_grad)
    if c is None:
        difference = compare(first.graph, load_subject(b, no_grad=no_grad).graph)
    else:
        second = replace(first, graph=first.graph.copy())
        rewrite(first, b)
        rewrite(second, c)
        difference = compare(first.graph, second.graph)
    if json:
        names = (a, b) if c is None else (b, c)
        show_json(
            "diff",
            {"a": names[0], "b": names[1], "equal": not difference, "diff": asdict(difference)},
        )
    else:
        show(diff_view(difference))
    if difference:
        raise typer.Exit(1)
