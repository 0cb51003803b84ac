"""What a command works on: the graph that the argument M stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphopt.cli.console import phase
from graphopt.cli.model import Example, load_example, near
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.pipeline import Pipeline
from graphopt.text import parse_graph, print_graph

if TYPE_CHECKING:
    from graphopt.capture import Capture
    from graphopt.pipeline.step import PassStep


@dataclass(frozen=True)
class Subject:
    """A graph to work on, and the model it was captured from if it was.

    Attributes:
        name: what the user called it, without folders.
        graph: the graph; commands may rewrite it.
        example: the model and the call that were captured; None for a ``.gopt`` file.
        capture: how it was captured; None for a ``.gopt`` file.
    """

    name: str
    graph: Graph
    example: Example | None = None
    capture: Capture | None = None


def load_subject(name: str, *, no_grad: bool = False) -> Subject:
    """Read or capture the graph that the argument M names.

    Args:
        name: ``package.module:factory``, ``path.py:factory`` or a ``.gopt`` file.
        no_grad: capture the inference graph.

    Raises:
        ArgumentError: `name` leads to no model and no file.
        CaptureError: the model cannot be captured.
        TextError: the file is no graph.
    """
    if name.endswith(".gopt"):
        if no_grad:
            raise ArgumentError(
                "--no-grad is about how to capture, and a .gopt file is a graph already"
            )
        return Subject(Path(name).stem, parse_graph(_read(Path(name))))
    with phase("importing torch's compiler"):
        from graphopt.capture import capture
    with phase(f"making {name}"):
        example = load_example(name)
    with phase(f"capturing {example.name}"), mode(example, no_grad=no_grad):
        captured = capture(example.model, example.args, example.kwargs)
    return Subject(example.name, captured.graph, example, captured)


def text_of(name: str, *, no_grad: bool) -> str:
    """The ``.gopt`` text of the argument M; of a file it is what stands there.

    Raises:
        ArgumentError, CaptureError: as in `load_subject`.
    """
    if name.endswith(".gopt"):
        return _read(Path(name))
    return print_graph(load_subject(name, no_grad=no_grad).graph)


def rewrite(graph: Graph, spec: str) -> tuple[PassStep, ...]:
    """Run the passes of `spec` on `graph`, in place."""
    pipeline = Pipeline.parse(spec)
    with phase(f"running {spec}"):
        return pipeline.run(graph)


@contextlib.contextmanager
def mode(example: Example | None, *, no_grad: bool) -> Iterator[None]:
    """The mode in which the example's call is made; nothing for a graph without a model."""
    if example is not None and no_grad:
        example.model.eval()
    with torch.set_grad_enabled(not no_grad):
        yield


def _read(path: Path) -> str:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.gopt")] if path.parent.is_dir() else []
        hint = f"files there: {near(path.name, siblings)}" if siblings else ""
        raise ArgumentError(f"there is no file {str(path)!r}", hint=hint)
    return path.read_text()
