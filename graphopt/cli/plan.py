"""`graphopt plan`: what passes that decide by cost would decide for M, and by which figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import Json, ModelName
from graphopt.cli.plan_formats import plan_formats
from graphopt.cli.plan_groups import DEFAULT_LINK, plan_groups
from graphopt.errors import ArgumentError
from graphopt.registry import PLANNED

EMITTERS = ("ddp",)


def plan(
    model: ModelName,
    mesh: Annotated[
        str | None,
        typer.Option(metavar="MESH", help="Ranks, as dp=64; groups need it.", show_default=False),
    ] = None,
    passes: Annotated[
        str,
        typer.Option(
            "--passes",
            "-p",
            metavar="SPEC",
            help="Passes with one that groups gradients, or one that lowers formats; what is "
            "before it is run first, and the link of the former is taken.",
        ),
    ] = PLANNED,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Machine whose all-reduce to assume, such as summit; {DEFAULT_LINK} if neither "
            "this nor SPEC names one.",
            show_default=False,
        ),
    ] = None,
    emit: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="ddp: plan for DistributedDataParallel's own order of gradients, found by one "
            "eager step, and print the option that makes it use the plan.",
            show_default=False,
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Assumed floating-point operations per second of each device."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Formats: also draw the front of time and change of the loss, as SVG.",
            show_default=False,
        ),
    ] = None,
    accuracy: Annotated[
        bool,
        typer.Option(
            "--accuracy",
            help="Formats: also lower each layer alone on the example inputs, and show how far "
            "outputs and gradients move.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Predict the groups in which gradients are best reduced, or show formats layer by layer.

    Groups: nothing is measured; compute is a roofline estimate for an assumed GPU, as in simulate,
    and the link a model of the named machine. Formats: times are measured on this device, or from
    the roofline of an assumed one with cost=roofline.

    JSON: for groups model, compute ({flops, half_flops, bandwidth, overhead} of each device),
    link_from, assumed (inputs of the link that are assumptions), order ("graph" or "ddp"), exposed,
    above_bound (fraction), and as in Python groups: [{names, bytes, kind, ready, finish}],
    backward, finish, bound, candidates: [{name, sizes, finish}], link, times, world; all in seconds
    and bytes; parts: what the passes before have decided, by pass; with --emit ddp
    also bucket_cap_mb_list.

    JSON: for formats model, pass, operators: [{site, module, operator, phase, kind, float32_us,
    low_us, flops, bytes, bound, error, change, format, reason, detail}], totals: {format,
    operators, lowered, flops, flops_lowered, casts, cast_bytes, saved_before, saved_after,
    float32_us, chosen_us, change, budget, times}, front: [{seconds, change, lowered, chosen}],
    accuracy: [{layer, operators, output, gradient}], declined: [{site, reason, detail, numbers}].
    """
    if emit not in (None, *EMITTERS):
        raise ArgumentError(f"--emit {emit} is unknown", hint=f"use --emit {EMITTERS[0]}")
    if passes != PLANNED and emit is None and _lowers(passes):
        for option, given in (("--link", link), ("--flops", flops), ("--mesh", mesh)):
            if given is not None:
                raise ArgumentError(
                    f"{option} is about groups of gradients, and {passes!r} makes none",
                    hint=f"leave {option} out, or add {PLANNED} to -p",
                )
        plan_formats(model, passes, plot=plot, accuracy=accuracy, json=json)
        return
    for option, wanted in (("--plot", plot is not None), ("--accuracy", accuracy)):
        if wanted:
            raise ArgumentError(
                f"{option} is about formats, and {passes!r} plans groups of gradients",
                hint="give -p a pass that lowers, and none that groups",
            )
    plan_groups(model, passes, mesh=mesh, link=link, emit=emit, flops=flops, json=json)


def _lowers(spec: str) -> bool:
    """Whether the plan is about formats: a pass lowers, and none groups."""
    from graphopt.pipeline.spec import parse_spec

    provided = {fact for pass_ in parse_spec(spec) for fact in pass_.provides}
    return "lowered" in provided and "grouped" not in provided
