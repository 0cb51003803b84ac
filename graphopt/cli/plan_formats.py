"""`graphopt plan` of a pass that lowers: which operator runs in which format, and why."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cli.console import phase, save, show, show_json
from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.analysis.accuracy import LayerError
    from graphopt.cli.subject import Subject
    from graphopt.graph import Graph
    from graphopt.passbase import Outcome, Pass
    from graphopt.pipeline.step import PassStep


def plan_formats(model: str, passes: str, *, plot: Path | None, accuracy: bool, json: bool) -> None:
    """Answer for a spec with a pass that lowers; see `graphopt.cli.plan.plan`."""
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject
        from graphopt.pipeline import Pipeline
    from graphopt.render.formats import formats_view

    whole = Pipeline.parse(passes).passes
    at = next(i for i, p in enumerate(whole) if "lowered" in p.provides)
    subject = load_subject(model)
    wide = _Before(at)
    with phase("choosing formats"):
        step = Pipeline(whole[: at + 1], (wide,)).run(subject.graph)[at]
    if step.skipped:
        raise ArgumentError(f"{step.spec} was skipped: {step.skipped}", hint="leave it out")
    errors = _errors(subject, wide.graph, whole[at]) if accuracy else []
    outcome = step.outcome
    if plot is not None:
        _plot(plot, subject.name, step.spec, outcome)
    if json:
        answer: dict[str, Any] = {
            "model": subject.name,
            "pass": step.spec,
            "operators": outcome.tables.get("operators", ()),
            "totals": next(iter(outcome.tables.get("totals", ())), {}),
            "front": outcome.tables.get("front", ()),
            "accuracy": [asdict(error) for error in errors],
            "declined": [asdict(site) for site in outcome.declined],
        }
        show_json("plan", answer)
        return
    show(formats_view(outcome, subject.name, errors))


class _Before:
    """Observes a pipeline: the graph before one of its passes."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.graph: Graph | None = None

    def before(self, index: int, pass_: Pass, graph: Graph) -> None:
        """Copy it."""
        if index == self.at:
            self.graph = graph.copy()

    def __call__(self, index: int, pass_: Pass, graph: Graph, step: PassStep) -> None:
        """Nothing to do."""


def _errors(subject: Subject, graph: Graph | None, lowering: Pass) -> list[LayerError]:
    from graphopt.analysis.accuracy import LowersAlone, layer_errors

    if not isinstance(lowering, LowersAlone) or graph is None:
        raise ArgumentError(
            f"{lowering.name} cannot lower a layer alone", hint="leave --accuracy out"
        )
    inputs = None if subject.capture is None else subject.capture.inputs
    with phase("lowering each layer alone"):
        return layer_errors(graph, lowering, inputs)


def _plot(path: Path, name: str, spec: str, outcome: Outcome) -> None:
    from graphopt.render.front import front_chart

    front = outcome.tables.get("front", ())
    if not front:
        raise ArgumentError(
            "there is no front to draw: without a calibration nothing is known of the loss",
            hint="graphopt calibrate M -o FILE, and calibration=FILE in -p",
        )
    save(path, front_chart(name, spec, front))
