"""`graphopt plan`: which gradients of M are reduced together, and how long that should take."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from graphopt.cli.compute import Compute
from graphopt.cli.console import phase, show, show_json, show_text
from graphopt.cli.data_parallel import gradients_of, ranks_of
from graphopt.errors import ArgumentError
from graphopt.registry import PLANNED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphopt.cli.subject import Subject
    from graphopt.passbase import Pass
    from graphopt.plan import PlanPart
    from graphopt.plan.grouping import Grouping, Ready

DEFAULT_LINK = "10gbe"


def plan_groups(
    model: str,
    passes: str,
    *,
    mesh: str | None,
    link: str | None,
    emit: str | None,
    device: str | None,
    flops: float | None,
    json: bool,
) -> None:
    """Answer for a spec with a pass that groups gradients; see `graphopt.cli.plan.plan`."""
    before, named, groups = _split(passes)
    if not groups and emit is None:
        raise ArgumentError(
            f"no pass of {passes!r} groups gradients, so there are no groups to plan",
            hint=f"-p {f'{passes},' if before else ''}{PLANNED}",
        )
    if mesh is None:
        raise ArgumentError(
            "groups of gradients are planned for a number of ranks", hint="--mesh dp=64"
        )
    world = _ranks(mesh)
    compute = Compute.of(device, flops, because=f"--mesh {mesh}")
    if emit == "ddp" and any(p.name == "schedule" for p in before):
        raise ArgumentError(
            "--emit ddp plans for PyTorch eager, whose backward no pass reorders",
            hint="leave schedule out of -p",
        )
    chosen = _link(link, named)
    from graphopt.network.clusters import cluster

    machine = cluster(chosen.name)
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject
        from graphopt.grouping.ddp import bucket_caps
        from graphopt.grouping.planner import plan as group
        from graphopt.plan.part import to_data
    from graphopt.render.grouping import above_bound, grouping_view
    from graphopt.render.part import part_view

    subject = load_subject(model)
    ready, backward, times, parts = _gradients(
        subject, _on_link(before, chosen.name), world, compute
    )
    if emit == "ddp":
        ready = _as_they_arrive(subject, ready)
    curve = machine.all_reduce(world)
    with phase("planning"):
        found = group(ready, curve, backward, link=curve.source, times=times, world=world)
    caps = bucket_caps(found) if emit == "ddp" else None
    if json:
        answer = {
            "model": subject.name,
            "compute": compute.to_json(),
            "link_from": chosen.origin,
            "assumed": machine.assumed,
            "order": emit or "graph",
            "exposed": found.exposed,
            "above_bound": above_bound(found),
            **asdict(found),
            "parts": {part.name: to_data(part) for part in parts},
        }
        show_json("plan", answer if caps is None else {**answer, "bucket_cap_mb_list": caps})
        return
    note = _note(chosen, machine.assumed)
    show(grouping_view(found, link_note=note, compute=compute.words()))
    for part in parts:
        show(part_view(part))
    if caps is not None:
        show(_about_ddp(found))
        show_text(f"model = DistributedDataParallel(model, bucket_cap_mb_list={caps})")


@dataclass(frozen=True)
class _Link:
    """The name of a machine, and who chose it."""

    name: str
    origin: str


def _ranks(mesh: str) -> int:
    """The number of data-parallel ranks, which is two or more."""
    world = ranks_of(mesh, "plan")
    if world == 1:
        raise ArgumentError(
            "with dp=1 there is one rank, so nothing has to be reduced", hint="--mesh dp=64"
        )
    return world


def _split(spec: str) -> tuple[tuple[Pass, ...], _Link | None, bool]:
    """The passes before the one that groups, the link it names, and whether there is one."""
    if spec == PLANNED:
        return (), None, True
    from graphopt.pipeline.spec import parse_spec

    parsed = parse_spec(spec)
    for index, pass_ in enumerate(parsed):
        if "grouped" in pass_.provides:
            named = str(getattr(pass_, "link", "measure"))
            link = None if named == "measure" else _Link(named, pass_.name)
            return parsed[:index], link, True
    return parsed, None, False


def _link(option: str | None, named: _Link | None) -> _Link:
    """The link to plan for; measuring it needs the ranks of a job, which a plan has not."""
    if option is not None:
        return _Link(option, "--link")
    return named or _Link(DEFAULT_LINK, "default")


def _on_link(passes: Sequence[Pass], name: str) -> tuple[Pass, ...]:
    """The passes, where those that would measure the link take the machine `name` instead."""
    option: dict[str, Any] = {"link": name}
    return tuple(
        dataclasses.replace(p, **option) if getattr(p, "link", "") == "measure" else p
        for p in passes
    )


def _gradients(
    subject: Subject, before: Sequence[Pass], world: int, compute: Compute
) -> tuple[tuple[Ready, ...], float, str, tuple[PlanPart, ...]]:
    """When which gradient is ready, the seconds of the backward, where the times are from.

    Last, what the passes before have decided.
    """
    from graphopt.passbase import PassContext
    from graphopt.pipeline import Pipeline
    from graphopt.pipeline.step import parts_of

    parts: tuple[PlanPart, ...] = ()
    if before:
        with phase("running passes"):
            context = PassContext(mesh={"dp": world})
            parts = parts_of(Pipeline(tuple(before)).run(subject.graph, context))
    order = gradients_of(subject.graph, subject.name, compute.order)
    return order.ready, order.backward, str(order.times), parts


def _as_they_arrive(subject: Subject, ready: tuple[Ready, ...]) -> tuple[Ready, ...]:
    """The gradients in the order in which `DistributedDataParallel` will see them."""
    from graphopt.grouping.ddp import arrival_order, in_order

    if subject.example is None:
        raise ArgumentError(
            "--emit ddp runs the model once, and a .gopt file is only its graph",
            hint="name the model as path.py:FACTORY",
        )
    with phase("running PyTorch eager"):
        example = subject.example
        return in_order(ready, arrival_order(example.model, example.args, example.kwargs))


def _note(link: _Link, assumed: Sequence[str]) -> str:
    origin = {"default": f"{link.name} by default, --link names another"}.get(
        link.origin, f"from {link.origin}"
    )
    return f"{origin}; assumed: {', '.join(assumed)}" if assumed else origin


def _about_ddp(found: Grouping) -> str:
    groups = f"these {len(found.groups)} groups" if len(found.groups) > 1 else "this one group"
    return (
        f"\nFrom its second step on, DistributedDataParallel forms {groups} with this line; with "
        "find_unused_parameters=True it never regroups."
    )
