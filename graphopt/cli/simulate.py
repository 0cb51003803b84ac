"""`graphopt simulate`: how a training step of M scales over a machine that is not here."""

from __future__ import annotations

import json as jsonlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.compute import HELP, Compute
from graphopt.cli.console import phase, save, show, show_json
from graphopt.cli.data_parallel import ranks_of
from graphopt.cli.options import Json, ModelName
from graphopt.cli.scaling import Assumed, predict, timeline_of
from graphopt.errors import ArgumentError
from graphopt.network.clusters import ALGORITHMS
from graphopt.network.clusters import cluster as named
from graphopt.network.negotiation import NEGOTIATIONS, Negotiator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphopt.simulate import Point, Timeline

STRAGGLER = 0.01
"""Assumed spread of a rank's step; without any the largest machines would look too good."""


def simulate(
    model: ModelName,
    mesh: Annotated[
        str, typer.Option(metavar="MESH", help="The largest machine, as dp=64.", show_default=False)
    ],
    cluster: Annotated[
        str,
        typer.Option(metavar="NAME", help="The machine, such as summit.", show_default=False),
    ],
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the efficiencies as an SVG chart.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the step of the largest machine for Perfetto."),
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
    straggler: Annotated[
        float,
        typer.Option(
            metavar="SIGMA", help="Assumed standard deviation of a rank's compute time, as a share."
        ),
    ] = STRAGGLER,
    contention: Annotated[
        float,
        typer.Option(metavar="FACTOR", help="How much slower compute is while a message travels."),
    ] = 1.0,
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"How messages are reduced: auto, as usual on that machine, or "
            f"{', '.join(ALGORITHMS)}.",
        ),
    ] = "auto",
    negotiation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How ranks without a common plan agree before each group: "
            f"{', '.join(NEGOTIATIONS)}.",
        ),
    ] = NEGOTIATIONS[0],
    json: Json = False,
) -> None:
    """Simulate training steps of M over 1, 2, 4, … ranks and tell how efficient they are.

    Each rank works on the inputs that M comes with. Compute is a roofline estimate for the device
    of --device, or the times of operators here, and the link is a model of the named machine. DDP
    stands for DistributedDataParallel's default buckets under the same assumptions. Neither of them
    has to negotiate at run time as Horovod does; --negotiation tells what that would cost.

    JSON: model, cluster, cluster_gpus, assumptions ({compute: {device, flops, half_flops,
    bandwidth, overhead}, straggler, contention, algorithm, negotiation: {name, message, tensor,
    radix}, link: names of the assumed inputs}), forward, backward,
    gradients, bytes, and points, a list of {world, step, exposed, efficiency, groups, ddp: {step,
    exposed, efficiency, groups}}; all in seconds and bytes.
    """
    world = ranks_of(mesh, "simulate")
    _check(straggler, contention)
    machine = named(cluster)
    machine.all_reduce(world, algorithm)  # an unknown one is said before the slow part
    negotiator = Negotiator(negotiation)
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject
    compute = Compute.of(device, flops, because=f"--mesh {mesh}")
    assumed = Assumed(machine, compute, straggler, contention, algorithm, negotiator)
    subject = load_subject(model)
    timeline = timeline_of(subject.graph, compute, subject.name)
    with phase("simulating"):
        points, ddp = predict(timeline, assumed, _worlds(world))
    if chart:
        save(chart, _chart(subject.name, assumed, points, ddp))
    if trace:
        from graphopt.render.perfetto import trace_events

        title = f"{subject.name} on {world:,} ranks of {machine.name} (simulated)"
        save(trace, jsonlib.dumps(trace_events(points[-1].trace, title)))
    if json:
        show_json("simulate", _answer(subject.name, timeline, assumed, points, ddp))
        return
    from graphopt.render.scaling import scaling_view

    show(scaling_view(points, ddp, assumed.words(timeline, world)))


# -- arguments -------------------------------------------------------------------------------------


def _check(straggler: float, contention: float) -> None:
    if not (math.isfinite(straggler) and straggler >= 0):
        raise ArgumentError(
            f"--straggler {straggler:g} is no standard deviation",
            hint=f"--straggler {STRAGGLER} is one per cent of the compute time, 0 is none",
        )
    if not (math.isfinite(contention) and contention >= 1):
        raise ArgumentError(
            f"--contention {contention:g} would make compute faster",
            hint="--contention 1 is no disturbance, 1.1 makes compute take 10 % longer",
        )


def _worlds(last: int) -> list[int]:
    """1, 2, 4, … and `last`."""
    return [*(2**power for power in range((last - 1).bit_length())), last]


# -- answers ---------------------------------------------------------------------------------------


def _answer(
    name: str,
    timeline: Timeline,
    assumed: Assumed,
    points: Sequence[Point],
    ddp: Sequence[Point],
) -> dict[str, object]:
    return {
        "model": name,
        "cluster": assumed.machine.name,
        "cluster_gpus": assumed.machine.gpus,
        "assumptions": {
            "compute": assumed.compute.to_json(),
            "straggler": assumed.straggler,
            "contention": assumed.contention,
            "algorithm": assumed.algorithm,
            "negotiation": asdict(assumed.negotiator),
            "link": assumed.machine.assumed,
        },
        "forward": timeline.forward,
        "backward": timeline.backward,
        "gradients": len(timeline.ready),
        "bytes": sum(g.bytes for g in timeline.ready),
        "points": [
            {"world": p.world, **_figures(p), "ddp": _figures(d)}
            for p, d in zip(points, ddp, strict=True)
        ],
    }


def _figures(point: Point) -> dict[str, object]:
    return {
        "step": point.step,
        "exposed": point.exposed,
        "efficiency": point.efficiency,
        "groups": point.groups,
    }


def _chart(name: str, assumed: Assumed, points: Sequence[Point], ddp: Sequence[Point]) -> str:
    from graphopt.render.chart import efficiency_chart
    from graphopt.render.units import count

    device = assumed.compute.device
    compute = f"roofline at {count(device.flops)}FLOP/s" if device else "compute as measured here"
    subtitle = (
        f"predicted, not measured: {compute}, "
        f"straggler {100 * assumed.straggler:.3g} %, contention {assumed.contention:g}, "
        f"all-reduce {assumed.algorithm}"
    )
    if assumed.negotiator.name != "none":
        subtitle += f", negotiation {assumed.negotiator.name}"
    series = {
        "graphopt": [(p.world, p.efficiency) for p in points],
        "DDP default": [(p.world, p.efficiency) for p in ddp],
    }
    return efficiency_chart(f"{name} on {assumed.machine.name}", subtitle, series)
