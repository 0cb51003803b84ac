"""`graphopt calibrate`: what the tensors of M are like on its example inputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.console import phase, show, show_json
from graphopt.cli.options import Json, ModelName
from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.calibration.record import Calibration


def calibrate(
    model: ModelName,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to write it.", show_default=False
        ),
    ],
    json: Json = False,
) -> None:
    """Run the step of M on its example inputs and keep what passes need to choose formats.

    The example inputs are the calibration set; the factory may return a list of several. Kept are
    the magnitudes of every tensor, forward and backward, and for each forward operator the expected
    change of the loss by rounding. The loss is the model's own where it returns one number first;
    else half the squared change of its outputs per example. With another loss use
    graphopt.calibrate in Python.

    JSON: model, file, batches, samples, loss, value, tensors (their number), operators (those with
    a sensitivity), notes.
    """
    if model.endswith(".gopt"):
        raise ArgumentError(
            "a .gopt file has no weights and no batches to calibrate on",
            hint="name the model as path.py:FACTORY",
        )
    if not output.parent.is_dir():
        raise ArgumentError(
            f"there is no folder {str(output.parent)!r}", hint="name a file in one that exists"
        )
    with phase("importing torch"):
        from graphopt.calibration.run import calibrate as run
        from graphopt.cli.model import blaming_inputs, load_example
    with phase(f"making {model}"):
        example = load_example(model)
    with (
        phase(f"calibrating {example.name}"),
        warnings.catch_warnings(),
        blaming_inputs(example),
    ):
        warnings.simplefilter("ignore")  # the notes are part of the answer
        found = run(example.model, example.batches)
    if not found.samples:
        raise ArgumentError(
            f"the example inputs of {example.name} hold no examples",
            hint="let the factory return a batch with examples in it",
        )
    found.save(output)
    if json:
        answer = {
            "model": example.name,
            "file": str(output),
            "batches": found.batches,
            "samples": found.samples,
            "loss": found.loss,
            "value": found.value,
            "tensors": len(found.tensors),
            "operators": len(found.sensitivities),
            "notes": found.notes,
        }
        show_json("calibrate", answer)
        return
    show(*_lines(found, example.name, output))


def _lines(found: Calibration, name: str, output: Path) -> list[str]:
    from graphopt.render.units import plural

    losses = {
        "given": "the given loss",
        "model": "the model's own loss",
        "outputs": "half the squared change of the outputs per example",
    }
    value = "" if found.value is None else f", {found.value:.4g} on average"
    few = "; ranges and sensitivities of so few may not be those of others"
    lines = [
        f"[bold]{name}[/]  calibrated on {plural(found.samples, 'sample')} in "
        f"{plural(found.batches, 'batch')}{few if found.samples < 8 else ''}",
        f"[dim]loss[/]     {losses[found.loss]}{value}",
        f"[dim]tensors[/]  {len(found.tensors)} with their magnitudes, "
        f"{len(found.sensitivities)} operators with their sensitivity",
    ]
    lines += [f"[yellow]note[/]     {note}" for note in found.notes]
    return [*lines, f"[dim]file[/]     {output}"]
