"""The `graphopt` command."""

from __future__ import annotations

import sys

import click
import typer
from typer.core import TyperGroup

from graphopt.cli import diff, doctor, passes, run, show, verify, why
from graphopt.errors import ArgumentError, GraphoptError, SpecError

FINDING = 1
USAGE = 2


class Commands(TyperGroup):
    """Prints graphopt's errors in their own words and turns them into exit codes."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except GraphoptError as error:
            print(error, file=sys.stderr)
            usage = isinstance(error, ArgumentError | SpecError)
            raise typer.Exit(USAGE if usage else FINDING) from error


app = typer.Typer(
    cls=Commands,
    help="A compiler for PyTorch training steps.\n\n"
    "Exit codes: 0 ok, 1 a finding (graphs differ, verification failed, the model cannot be "
    "captured), 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (show, run, why, diff, verify, passes, doctor):
    name = command.__name__.rpartition(".")[2]
    app.command(name)(getattr(command, name))
