"""`graphopt verify`: does every pass keep to its numerics class, on real inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import typer

from graphopt.cli.console import phase, show, show_json
from graphopt.cli.options import Json, ModelName, NoGrad, Passes

if TYPE_CHECKING:
    from graphopt.passbase import Numerics, Pass
    from graphopt.report import Step
    from graphopt.graph import Graph
    from graphopt.cli.observe import Observe


@dataclass(frozen=True)
class Stage:
    """One comparison: a graph with the one before it.

    Attributes:
        stage: ``"capture"``, which is compared with PyTorch eager, or a pass, compared with the
            graph before it.
        numerics: how far it may move results.
        allowed: largest error, relative to the largest magnitude of a tensor, that this means.
        error: the largest there is.
        worst: the output, gradient or buffer that has it.
        result: ``"bit-equal"``, ``"within its class"``, ``"out of its class"`` or ``"skipped"``.
    """

    stage: str
    numerics: str
    allowed: float
    error: float
    worst: str
    result: str


def verify(model: ModelName, passes: Passes, no_grad: NoGrad = False, json: Json = False) -> None:
    """Run M on its inputs in PyTorch eager, as captured, and after each pass, and compare.

    Compared are all outputs, gradients and buffers, from the same random numbers, each graph with
    the one before it, at the numerics class of the pass between them. Exits with 1 and names the
    first pass that is out of its class.

    JSON: model, passes, ok, first_bad (a stage or null), and stages, a list of {stage, numerics,
    allowed, error, worst, result}.
    """
    from graphopt.cli.observe import observer_of
    from graphopt.cli.subject import load_subject, mode
    from graphopt.passbase import EXACT, PassContext
    from graphopt.pipeline import Pipeline

    pipeline = Pipeline.parse(passes)
    subject = load_subject(model, no_grad=no_grad)
    context = PassContext()
    observe = observer_of(subject, context.state)
    stages = _Stages(observe)
    with phase("running before and after each pass"), mode(subject.example, no_grad=no_grad):
        stages.start(subject.graph)
        Pipeline(pipeline.passes, (stages,)).run(subject.graph, context)
