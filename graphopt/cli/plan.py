"""`graphopt plan`: what passes that decide by cost would decide for M, and by which figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.compute import HELP
from graphopt.cli.options import Json, ModelName
from graphopt.cli.plan_formats import plan_formats
from graphopt.cli.plan_groups import DEFAULT_LINK, plan_groups
from graphopt.cli.plan_stages import plan_stages
from graphopt.cli.plan_weights import plan_weights
from graphopt.errors import ArgumentError
from graphopt.registry import PLANNED

EMITTERS = ("ddp",)


def plan(
    model: ModelName,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="MESH",
            help="Ranks, as dp=64, which groups need, or pp=4 for stages.",
            show_default=False,
        ),
    ] = None,
    passes: Annotated[
        str,
        typer.Option(
            "--passes",
            "-p",
            metavar="SPEC",
            help="Passes with one that groups gradients, one that makes stages, or one that lowers "
            "formats; what is before it is run first, and its link is taken.",
        ),
    ] = PLANNED,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Machine whose network to assume, such as summit; {DEFAULT_LINK} if neither "
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
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help=HELP, show_default=False)
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
            help="Formats: also draw the front of time and change of the loss, as SVG. Stages: "
            "also draw the simulated step.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Stages: also write the simulated step for Perfetto.",
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
    """Predict groups of gradients or stages of a pipeline, or show formats or factors by layer.

    Groups and stages: compute is a roofline estimate for the device of --device, as in simulate, or
    the times of operators here, and the link a model of the named machine. Formats: times are
    measured on this device, or from the roofline of an assumed one with cost=roofline. Stages: the
    call of the example is one micro-batch, in a simulated schedule.

    JSON: for groups model, compute ({device, flops, half_flops, bandwidth, overhead}),
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

    JSON: for stages model, pass, declined, and the plan part: schedule, micro_batches, ranks,
    stages: [{rank, modules, forward_nodes, backward_nodes, parameters, forward, input_grad,
    weight_grad, saved, parameter_bytes, in_flight, memory}], crossings: [{name, module, made, read,
    relayed, bytes, back}], cuts: [{forward, backward}], shared: [{name, stages, seconds}], sums,
    objective, value, lower, proof, times, link, limit, step, bubble; all in seconds and bytes.

    JSON: for weights model, pass, weights: [{site, form, seconds, error, numbers, why}], applied:
    [{site, what, numbers}], declined: [{site, reason, detail, numbers}].
    """
    if emit not in (None, *EMITTERS):
        raise ArgumentError(f"--emit {emit} is unknown", hint=f"use --emit {EMITTERS[0]}")
    if passes != PLANNED and _replaces(passes):
        for option, value in (("--plot", plot), ("--link", link), ("--mesh", mesh)):
            if value is not None:
                raise ArgumentError(
                    f"{option} has no meaning for weights, which {passes!r} plans",
                    hint=f"leave {option} out",
                )
        plan_weights(model, passes, json=json)
        return
    facts = _provided(passes) if passes != PLANNED and emit is None else frozenset()
    if "staged" in facts and "grouped" not in facts:
        for option, wanted in (("--flops", flops is not None), ("--accuracy", accuracy)):
            if wanted:
                raise ArgumentError(
                    f"{option} has no meaning for stages, which {passes!r} plans",
                    hint=f"leave {option} out; cost=measure times operators on this device",
                )
        plan_stages(
            model, passes, mesh=mesh, link=link, device=device, plot=plot, trace=trace, json=json
        )
        return
    if trace is not None:
        raise ArgumentError(
            f"--trace is about stages, and {passes!r} makes none", hint="-p partition --mesh pp=4"
        )
    if "lowered" in facts and "grouped" not in facts:
        cost = ("--link", link), ("--flops", flops), ("--device", device), ("--mesh", mesh)
        for option, given in cost:
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
    plan_groups(
        model, passes, mesh=mesh, link=link, emit=emit, device=device, flops=flops, json=json
    )


def _replaces(spec: str) -> bool:
    """Whether the last pass of a spec works on the forward graph."""
    from graphopt.pipeline import Pipeline

    passes = Pipeline.parse(spec).passes
    return bool(passes) and passes[-1].on_forward


def _provided(spec: str) -> frozenset[str]:
    """What the passes of a spec provide: formats if one lowers, stages if one makes them."""
    from graphopt.pipeline.spec import parse_spec

    return frozenset(fact for pass_ in parse_spec(spec) for fact in pass_.provides)
