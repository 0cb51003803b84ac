"""`graphopt plan` of a pass that makes stages: which they are, and what a step should take."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cli.compute import MEASURE, Compute
from graphopt.cli.console import phase, save, show, show_json
from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping


def plan_stages(
    model: str,
    passes: str,
    *,
    mesh: str | None,
    link: str | None,
    device: str | None,
    plot: Path | None,
    trace: Path | None,
    json: bool,
) -> None:
    """Answer for a spec with a pass that makes stages; see `graphopt.cli.plan.plan`."""
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject
        from graphopt.model.arguments import parse_mesh
        from graphopt.passbase import PassContext
        from graphopt.pipeline import Pipeline
        from graphopt.plan.part import to_data
    from graphopt.render.stages import stages_view

    sizes = parse_mesh(mesh)
    whole = _on_link(Pipeline.parse(passes).passes, link)
    compute = _compute(whole, device, passes if mesh is None else f"--mesh {mesh}")
    if compute.device is None:
        whole = tuple(replace(p, cost=MEASURE) if "staged" in p.provides else p for p in whole)
    at = next(i for i, p in enumerate(whole) if "staged" in p.provides)
    subject = load_subject(model)
    with phase("choosing stages"):
        step = Pipeline(whole[: at + 1]).run(
            subject.graph, PassContext(mesh=sizes, device=compute.device)
        )[at]
    if step.skipped:
        raise ArgumentError(f"{step.spec} was skipped: {step.skipped}", hint="leave it out")
    part = step.outcome.part
    if part is None:
        said = "; ".join(one.detail for one in step.outcome.declined)
        raise ArgumentError(f"there are no stages to plan: {said}", hint="--mesh pp=4")
    data = to_data(part)
    if plot is not None or trace is not None:
        _draw(subject.name, data, plot, trace)
    if json:
        declined = [asdict(site) for site in step.outcome.declined]
        found = {"model": subject.name, "pass": step.spec, "compute": compute.to_json()}
        answer = {**found, **data, "declined": declined}
        show_json("plan", answer)
        return
    show(stages_view(data, subject.name), f"compute  {compute.words()}")


def _compute(passes: tuple[Any, ...], device: str | None, because: str) -> Compute:
    """What ``--device`` says, or the option ``cost=measure`` of the pass."""
    measured = any(p.cost == MEASURE for p in passes if "staged" in p.provides)
    return Compute.of(device or (MEASURE if measured else None), None, because=because)


def _on_link(passes: tuple[Any, ...], link: str | None) -> tuple[Any, ...]:
    """With the machine of ``--link`` in the pass that makes stages."""
    if link is None:
        return passes
    return tuple(replace(p, link=link) if "staged" in p.provides else p for p in passes)


def _draw(name: str, data: Mapping[str, Any], plot: Path | None, trace: Path | None) -> None:
    """Write the simulated step as a chart, and for Perfetto."""
    from graphopt.render.perfetto import trace_events
    from graphopt.render.pipeline import pipeline_chart
    from graphopt.simulate.pipeline import planned_pipeline

    simulated = planned_pipeline(data)
    title = f"{name}: {len(data['stages'])} stages, {data['schedule']} (simulated)"
    if plot is not None:
        save(plot, pipeline_chart(simulated, title))
    if trace is not None:
        held = {f"bytes of rank {rank}": steps for rank, steps in enumerate(simulated.memory)}
        save(trace, jsonlib.dumps(trace_events(simulated, title, held)))
