"""`graphopt verify`: does every pass keep to its numerics class, on real inputs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graphopt.cli import verify_padding
from graphopt.cli.console import phase, show, show_json
from graphopt.cli.options import Json, ModelName, NoGrad, OptionalPasses
from graphopt.cli.verify_rows import BAD, Row, first_of
from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.cli.observe import Observe
    from graphopt.graph import Graph
    from graphopt.model.comparison import Observed
    from graphopt.passbase import Numerics, Pass
    from graphopt.pipeline.step import PassStep


def verify(
    model: ModelName,
    passes: OptionalPasses = None,
    padding: Annotated[
        bool,
        typer.Option(
            "--padding", help="Compare with the same batch padded, in place of comparing passes."
        ),
    ] = False,
    pad: Annotated[
        list[str] | None,
        typer.Option(
            "--pad",
            metavar="NAME=DIM[:VALUE]",
            help="An argument of forward that is padded, its dimension (or several, as 2,3), and "
            "with what, 0 by default; for --padding, any number of times. By default all that have "
            "the shape (batch, length) of the argument with 'mask' in its name.",
            show_default=False,
        ),
    ] = None,
    side: Annotated[
        Literal["right", "left"], typer.Option(help="Where padding goes; for --padding.")
    ] = "right",
    backend: Annotated[
        str,
        typer.Option(
            help="Also compare what this backend makes of the last graph.", show_default=False
        ),
    ] = "",
    no_grad: NoGrad = False,
    json: Json = False,
) -> None:
    """Run M in PyTorch eager, as captured, and after each pass, and compare what it computes.

    Compared are all outputs, gradients and buffers, from the same inputs and random numbers, each
    graph with the one before it, at the numerics class of the pass between them. Exits with 1 and
    names the first pass that is out of its class. A .gopt file is run on made-up inputs.

    Where a pass leaves work for the runtime, or with --backend, M then takes two steps as it would
    be optimized: what runs is compared with eager, and forms of its backward with each other.

    With --padding, M runs in PyTorch eager on its example inputs, and on the same with padded
    positions more. Compared are outputs at true positions, the loss, gradients and buffers. Exits
    with 1 if something changes, and names the operators by which it does.

    JSON: model, passes, ok, first_bad (a stage or null), and stages, a list of {stage, numerics,
    allowed, error, worst, result}. With --padding: model, ok, padded (by argument: value, dim,
    side), length, more, allowed, compared, a list of {kind, error, worst}, and leaks, a list of
    {operator, says, module, line}.
    """
    if padding:
        if passes is not None:
            raise ArgumentError(
                "-p and --padding are two questions", hint="ask one after the other"
            )
        verify_padding.run(model, pad or [], side, no_grad=no_grad, json=json)
        return
    if pad or side != "right":
        raise ArgumentError("--pad and --side are for --padding", hint="add --padding")
    if passes is None:
        raise ArgumentError(
            "there is nothing to verify", hint="name passes, such as -p cleanup, or --padding"
        )
    with phase("importing torch"):
        from graphopt.cli.observe import by_eager, on_example, on_made_up_inputs
        from graphopt.cli.subject import load_subject, mode
    from graphopt.model.comparison import tolerance
    from graphopt.passbase import EXACT, PassContext
    from graphopt.pipeline import Pipeline

    pipeline = Pipeline.parse(passes)
    subject = load_subject(model, no_grad=no_grad)
    graph, context = subject.graph, PassContext()
    stages: list[Row] = []
    if subject.example and subject.capture:
        with phase("running PyTorch eager"), mode(subject.example, no_grad=no_grad):
            reference = by_eager(subject.example)
            observe = on_example(subject.example, subject.capture, context.states)
            captured = observe(graph)
        stages.append(_stage("capture", EXACT, tolerance(reference, EXACT), reference, captured))
    else:
        observe = on_made_up_inputs(graph, context.states)
        captured = observe(graph)
    checks = _Checks(stages, captured, observe)
    with phase(f"running {passes}"), mode(subject.example, no_grad=no_grad):
        Pipeline(pipeline.passes, (checks,)).run(graph, context)
    if first_of(stages) is None and (backend or checks.parts):
        if not subject.example or not subject.capture:
            if backend:
                raise ArgumentError(
                    "a .gopt file has no model whose steps a backend could run",
                    hint="name a model and its example inputs, or leave --backend out",
                )
        else:
            from graphopt.cli import verify_steps

            with phase("running steps"), mode(subject.example, no_grad=no_grad):
                stages += verify_steps.rows(subject.example, pipeline, backend or "eager")
    first_bad = first_of(stages)
    if json:
        answer = {
            "model": subject.name,
            "passes": passes,
            "ok": first_bad is None,
            "first_bad": first_bad,
            "stages": [asdict(stage) for stage in stages],
        }
        show_json("verify", answer)
    else:
        _show(stages, first_bad)
    if first_bad is not None:
        raise typer.Exit(1)


class _Checks:
    """Observes a pipeline: runs the graph after each pass and compares it with the one before."""

    def __init__(self, stages: list[Row], captured: Observed, observe: Observe) -> None:
        self.stages = stages
        self.parts = False
        self._before = captured
        self._observe = observe

    def __call__(self, index: int, pass_: Pass, graph: Graph, step: PassStep) -> None:
        """Add one stage."""
        self.parts |= step.outcome.part is not None
        if step.skipped:
            self.stages.append(Row(step.spec, str(step.numerics), 0.0, 0.0, "", "skipped"))
            return
        from graphopt.model.comparison import tolerance_of_pass

        after = self._observe(graph)
        allowed = tolerance_of_pass(after, step.numerics)
        self.stages.append(_stage(step.spec, step.numerics, allowed, self._before, after))
        self._before = after


def _stage(name: str, numerics: Numerics, allowed: float, before: Observed, after: Observed) -> Row:
    from graphopt.model.comparison import Observed, compare

    # A pass may declare that it adds or removes outputs; the pipeline checks that it did.
    common = before.values.keys() & after.values.keys()
    old, new = (Observed({n: o.values[n] for n in sorted(common)}) for o in (before, after))
    worst = compare(old, new)
    within = "bit-equal" if worst.equal else "within its class"
    result = within if worst.error <= allowed else BAD
    return Row(name, str(numerics), allowed, worst.error, worst.name, result)


def _show(stages: list[Row], first_bad: str | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "numerics", "error", "allowed", "result"):
        table.add_column(title, overflow="fold")
    for stage in stages:
        colour = {BAD: "red", "skipped": "yellow"}.get(stage.result, "green")
        worst = f", worst {escape(stage.worst)}" if stage.worst else ""
        table.add_row(
            escape(stage.stage),
            stage.numerics,
            f"{stage.error:.2g}",
            f"{stage.allowed:.2g}",
            f"[{colour}]{stage.result}[/]{worst}",
        )
    show(table)
    if first_bad is not None:
        show(f"\nfirst out of its class: [bold]{escape(first_bad)}[/]")
