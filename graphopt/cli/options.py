"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="M",
        help="package.module:factory or path.py:factory, where factory() returns "
        "(model, example_inputs), of which the first is taken if they are a list; or a .gopt file.",
        show_default=False,
    ),
]
OptionalModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="M",
        help="package.module:factory or path.py:factory, as for other commands.",
        show_default=False,
    ),
]
Passes = Annotated[
    str,
    typer.Option(
        "--passes",
        "-p",
        metavar="SPEC",
        help="The passes to run, such as 'cleanup,schedule{link=summit}'.",
        show_default=False,
    ),
]
OptionalPasses = Annotated[
    str | None,
    typer.Option(
        "--passes",
        "-p",
        metavar="SPEC",
        help="Run these passes first, such as 'cleanup'.",
        show_default=False,
    ),
]
NoGrad = Annotated[
    bool, typer.Option("--no-grad", help="Capture the inference graph: model.eval(), no_grad.")
]
Json = Annotated[bool, typer.Option("--json", help="Answer as one JSON object.")]
