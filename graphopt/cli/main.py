"""The `graphopt` command."""

from __future__ import annotations

import atexit
import functools
import gc
import sys
from collections.abc import Callable

import typer

from graphopt.cli import (
    calibrate,
    diff,
    doctor,
    passes,
    plan,
    report,
    run,
    show,
    simulate,
    verify,
    why,
)
from graphopt.cli.noise import gathered
from graphopt.errors import ArgumentError, GraphoptError, SpecError

FINDING = 1
USAGE = 2

app = typer.Typer(
    help="A compiler for PyTorch training steps.\n\n"
    "Exit codes: 0 ok, 1 a finding (graphs differ, verification failed, the model cannot be "
    "captured), 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _reporting(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with graphopt's errors printed in their own words and as exit codes."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            with gathered():
                command(*args, **kwargs)
        except GraphoptError as error:
            print(error, file=sys.stderr)
            usage = isinstance(error, ArgumentError | SpecError)
            raise typer.Exit(USAGE if usage else FINDING) from error

    return wrapped


for _command in (
    show.show,
    run.run,
    why.why,
    diff.diff,
    verify.verify,
    plan.plan,
    report.report,
    calibrate.calibrate,
    simulate.simulate,
    passes.passes,
    doctor.doctor,
):
    app.command()(_reporting(_command))


def main() -> None:
    """The command in a process of its own."""
    # Thousands of modules of torch and its compiler stay. To look for garbage among their objects
    # while they load, and once more at the end, would be a large part of a command's time.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
    app(prog_name="graphopt")
