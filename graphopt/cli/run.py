"""`graphopt run`: what the passes do to M, pass by pass."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.console import phase, show, show_json
from graphopt.cli.diff import as_data
from graphopt.cli.options import Json, ModelName, NoGrad, Passes

if TYPE_CHECKING:
    from graphopt.diff import Diff
    from graphopt.graph import Graph
    from graphopt.passbase import Pass
    from graphopt.pipeline.step import PassStep


def run(
    model: ModelName,
    passes: Passes,
    lines: Annotated[bool, typer.Option("--lines", help="Show each line that differs.")] = False,
    no_grad: NoGrad = False,
    json: Json = False,
) -> None:
    """Run passes on M: per pass the difference by module, times, what was applied and declined.

    JSON: model, level, and steps, a list of {pass, skipped, numerics, seconds, verify_seconds,
    nodes_before, nodes_after, applied: [{site, what, numbers}], declined: [{site, reason, detail,
    numbers}], diff}, where diff is as in `graphopt diff --json`.
    """
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject
        from graphopt.pipeline import Pipeline

    pipeline = Pipeline.parse(passes)
    subject = load_subject(model, no_grad=no_grad)
    changes = _Changes(subject.graph)
    with phase(f"running {passes}"):
        steps = Pipeline(pipeline.passes, (changes,)).run(subject.graph)
    if json:
        answer = {
            "model": subject.name,
            "level": str(subject.graph.level),
            "steps": [_step(s, d) for s, d in zip(steps, changes.diffs, strict=True)],
        }
        show_json("run", answer)
    else:
        from graphopt.render.diff import diff_view
        from graphopt.render.steps import step_view

        for step, diff in zip(steps, changes.diffs, strict=True):
            show(step_view(step, diff_view(diff, lines=lines)))


class _Changes:
    """Observes a pipeline: what each pass changed."""

    def __init__(self, graph: Graph) -> None:
        self.diffs: list[Diff] = []
        self._before = graph.copy()

    def __call__(self, index: int, pass_: Pass, graph: Graph, step: PassStep) -> None:
        """Compare with the graph before this pass."""
        from graphopt.diff import diff_graphs

        after = graph.copy()
        self.diffs.append(diff_graphs(self._before, after))
        self._before = after


def _step(step: PassStep, diff: Diff) -> dict[str, object]:
    return {
        "pass": step.spec,
        "skipped": step.skipped,
        "numerics": str(step.numerics),
        "seconds": step.seconds,
        "verify_seconds": step.verify_seconds,
        "nodes_before": step.nodes_before,
        "nodes_after": step.nodes_after,
        "applied": [asdict(site) for site in step.outcome.applied],
        "declined": [asdict(site) for site in step.outcome.declined],
        "diff": as_data(diff),
    }
