"""`graphopt report`: one page about M and what passes make of it."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.compute import HELP, Compute
from graphopt.cli.console import phase, save, show_json, show_text
from graphopt.cli.options import Json, ModelName, NoGrad
from graphopt.errors import ArgumentError
from graphopt.registry import PRESETS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graphopt.cli.subject import Subject
    from graphopt.graph import Graph
    from graphopt.render.report.document import Document
    from graphopt.render.report.timeline import Link

DEFAULT_LINK = "10gbe"
ASSUMED = "h100"


def report(
    model: ModelName,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page, such as report.html."),
    ] = None,
    passes: Annotated[
        str,
        typer.Option("--passes", "-p", metavar="SPEC", help="The passes to report on, or auto."),
    ] = "auto",
    mesh: Annotated[
        str | None,
        typer.Option(metavar="MESH", help="Ranks, as dp=64 or pp=4.", show_default=False),
    ] = None,
    link: Annotated[
        str,
        typer.Option(metavar="NAME", help="Machine whose network to assume, such as summit."),
    ] = DEFAULT_LINK,
    device: Annotated[str | None, typer.Option(metavar="NAME", help=HELP)] = None,
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Assumed floating-point operations per second of each device."
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the time lines for Perfetto."),
    ] = None,
    no_grad: NoGrad = False,
    json: Json = False,
) -> None:
    """Write a page about M: modules, passes, time line, memory, formats, factors, parameters.

    The page is one file that needs no network. Nothing is measured: times are a roofline estimate
    for an assumed device, and messages travel over a model of the named machine.

    JSON: model, passes, level, versions, figures: [[topic, words]], modules: a tree of {path, kind,
    output, parameters, forward and backward: {ops, flops, bytes, seconds}, saved, formats: FLOPs by
    format, children}, steps: [{spec, skipped, numerics, nodes, seconds, applied: [{site, what,
    numbers}], declined: [{site, reason, detail, numbers}]}], time_lines: [{title, assumed, lanes,
    activities: [{lane, kind, name, start, end}], counters}], memory: {points, peak, peak_at,
    saved}, factors: {options, blocks} or null, stories: [{name, role, type, module, facts,
    decisions: [{pass, verdict, words}], planned: [{part, path, words}]}]; in seconds and bytes.
    """
    if output is None and trace is None and not json:
        raise ArgumentError("a report needs a file to go to", hint="-o report.html, or --json")
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject, rewrite
        from graphopt.model.arguments import parse_mesh
    sizes = parse_mesh(mesh)
    _check_mesh(mesh or "", sizes, passes)
    # Of a machine that is named nothing is guessed; a page about one rank says what it assumes.
    assumed = ASSUMED if mesh is None and flops is None else None
    compute = Compute.of(device or assumed, flops, because=f"--mesh {mesh}")
    subject = load_subject(model, no_grad=no_grad)
    world = sizes.get("dp", 1)
    spec = PRESETS.get(passes, (passes, passes))[world > 1]
    graph, steps = rewrite(subject, _on_link(spec, link), sizes)
    with phase("gathering the report"):
        from graphopt.render.report.gather import Sources, document

        found = document(
            Sources(
                model=subject.name,
                passes=spec,
                captured=subject.graph,
                rewritten=graph,
                steps=steps,
                seconds=compute.seconds(graph),
                assumed=(("compute", compute.words()),),
                link=_messages(subject, graph, compute, world, link),
            )
        )
    _write(found, output, trace)
    if json:
        from dataclasses import asdict

        show_json("report", asdict(found))
    else:
        show_text("\n".join(f"wrote {path}" for path in (output, trace) if path))


def _check_mesh(mesh: str, sizes: Mapping[str, int], passes: str) -> None:
    from graphopt.pipeline.spec import parse_spec

    unknown = [name for name in sizes if name not in ("dp", "pp")]
    if unknown:
        raise ArgumentError(
            f"--mesh {mesh} has dimensions that report does not know: {', '.join(unknown)}",
            hint="dp=8 are ranks that average gradients, pp=4 are stages of a pipeline",
        )
    staged = passes not in PRESETS and any("staged" in p.provides for p in parse_spec(passes))
    if "pp" in sizes and not staged:
        raise ArgumentError(
            f"--mesh {mesh} has stages, and no pass of {passes!r} makes any",
            hint="-p partition, or leave pp out",
        )


def _messages(
    subject: Subject, graph: Graph, compute: Compute, world: int, link: str
) -> Link | None:
    """How the gradients of data-parallel ranks would be grouped and sent."""
    if world == 1:
        return None
    from graphopt.cli.data_parallel import gradients_of
    from graphopt.grouping.planner import plan
    from graphopt.network.clusters import cluster
    from graphopt.render.report.timeline import Link

    curve = cluster(link).all_reduce(world)
    order = gradients_of(graph, subject.name, compute.order)
    grouping = plan(order.ready, curve, order.backward, times=order.times, world=world)
    return Link(world, curve, grouping)


def _on_link(spec: str, link: str) -> str:
    """The spec, where passes that would measure the link take the named machine instead."""
    from dataclasses import replace

    from graphopt.pipeline.spec import format_spec, parse_spec

    passes = parse_spec(spec)
    named: dict[str, str] = {"link": link}
    return format_spec(
        replace(p, **named) if getattr(p, "link", "") == "measure" else p for p in passes
    )


def _write(found: Document, output: Path | None, trace: Path | None) -> None:
    from graphopt.render.report.page import page
    from graphopt.render.report.trace import trace_of

    if output is not None:
        save(output, page(found))
    if trace is not None:
        save(trace, jsonlib.dumps(trace_of(found)))
