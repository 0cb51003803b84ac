"""`graphopt diff`: what is different between two graphs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.console import phase, show, show_json, show_text
from graphopt.cli.options import Json, NoGrad

if TYPE_CHECKING:
    from graphopt.diff import Diff


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

    JSON: a, b, equal, and diff: {headline, moved, changes}, with changes a list of {kind, module,
    phase, what, before, after} where before and after are lines of .gopt text; plan: a line per
    decision of the passes that differs.
    """
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject, rewrite, text_of
        from graphopt.diff import diff_graphs, diff_texts
        from graphopt.pipeline.step import parts_of
        from graphopt.plan.reading import changes
    from graphopt.render.diff import diff_view

    planned: tuple[str, ...] = ()
    if c is None:
        names = (a, b)
        difference = diff_texts(*(text_of(name, no_grad=no_grad) for name in names))
    else:
        names = (b, c)
        subject = load_subject(a, no_grad=no_grad)
        made = [rewrite(subject, spec) for spec in names]
        difference = diff_graphs(*(graph for graph, _ in made))
        planned = changes(*(parts_of(steps) for _, steps in made))
    if json:
        answer = {"a": names[0], "b": names[1], "equal": not (difference or planned)}
        show_json("diff", {**answer, "diff": as_data(difference), "plan": planned})
    else:
        show(diff_view(difference, lines=True))
        for change in planned:
            show_text(f"plan {change}")
    if difference or planned:
        raise typer.Exit(1)


def as_data(difference: Diff) -> dict[str, object]:
    """The difference as it stands in an answer by ``--json``."""
    return {"headline": difference.headline, **asdict(difference)}
