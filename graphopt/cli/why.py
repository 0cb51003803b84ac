"""`graphopt why`: everything decided about one parameter or node."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.console import phase, show, show_json
from graphopt.cli.options import Json, ModelName, NoGrad

if TYPE_CHECKING:
    from graphopt.pipeline.step import PassStep


def why(
    model: ModelName,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A parameter, buffer or node, as `graphopt show --text` has it."
        ),
    ],
    passes: Annotated[
        str, typer.Option("--passes", "-p", metavar="SPEC", help="The passes to ask about.")
    ] = "cleanup",
    no_grad: NoGrad = False,
    json: Json = False,
) -> None:
    """Tell everything about one parameter or node of M, and what each pass did or declined there.

    Its origin, type, producers and users are those in the captured graph, or in the rewritten one
    for a node that a pass made.

    JSON: model, passes, graph ("captured" or "rewritten"), removed (whether a pass removed it),
    story (the fields shown), and decisions, a list of {pass, skipped, applied: [{site, what,
    numbers}], declined: [{site, reason, detail, numbers}]}, and plan: where the plan names it, a
    list of {part, path, values}; formats, where a pass lowered: {before, after, why, casts,
    readings: [{node, operator, phase, format, cast, why}]}.
    """
    with phase("importing torch"):
        from graphopt.analysis.formats import format_of, format_story
        from graphopt.analysis.provenance import names, provenance
        from graphopt.cli.model import near
        from graphopt.cli.subject import load_subject, rewrite
        from graphopt.pipeline.decisions import Decisions
        from graphopt.pipeline.step import parts_of
        from graphopt.plan.reading import mentions
    from graphopt.errors import ArgumentError
    from graphopt.render.formats import story_view
    from graphopt.render.provenance import provenance_view

    subject = load_subject(model, no_grad=no_grad)
    captured = names(subject.graph)
    told = provenance(subject.graph, name) if name in captured else None
    wide = format_of(captured.get(name))
    graph, steps = rewrite(subject, passes)
    rewritten = names(graph)
    origin = "captured"
    if told is None:
        if name not in rewritten:
            raise ArgumentError(
                f"{subject.name} has no parameter, buffer or node {name!r}",
                hint=f"near names: {near(name, [*captured, *rewritten])}",
            )
        told, origin = provenance(graph, name), "rewritten"
    removed = name not in rewritten
    decisions = Decisions(steps).about(told, removed=removed)
    planned = mentions(parts_of(steps), name)
    node = rewritten.get(name)
    story = None
    if "lowered" in graph.facts and (wide or format_of(node)):
        tables = [row for s in steps for row in s.outcome.tables.get("operators", ())]
        rows = {str(row["site"]): row for row in tables}
        story = format_story(graph, node, wide, rows)
    if json:
        answer = {
            "model": subject.name,
            "passes": passes,
            "graph": origin,
            "removed": removed,
            "story": asdict(told),
            "decisions": [
                {"pass": step.spec, "skipped": step.skipped, **_sites(step)} for step in decisions
            ],
            "plan": [asdict(mention) for mention in planned],
        }
        show_json("why", answer if story is None else {**answer, "formats": asdict(story)})
    else:
        show(provenance_view(told, decisions, planned, removed=removed))
        if story is not None:
            show(story_view(story))


def _sites(step: PassStep) -> dict[str, object]:
    outcome = step.outcome
    return {
        "applied": [asdict(site) for site in outcome.applied],
        "declined": [asdict(site) for site in outcome.declined],
    }
