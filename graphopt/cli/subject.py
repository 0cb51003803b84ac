"""What a command works on: the graph that the argument M stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphopt.cli.console import phase
from graphopt.cli.model import Example, blaming_inputs, load_example, near
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, Level
from graphopt.passbase import PassContext
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


def load_subject(name: str, *, no_grad: bool = False, forward: bool = False) -> Subject:
    """Read or capture the graph that the argument M names.

    Args:
        name: ``package.module:factory``, ``path.py:factory`` or a ``.gopt`` file.
        no_grad: capture the inference graph.
        forward: capture the forward graph.

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
        graph = parse_graph(_read(Path(name)))
        if forward and graph.level is not Level.FORWARD:
            raise ArgumentError(
                f"{name} is a graph of level {graph.level}", hint="leave --level out"
            )
        return Subject(Path(name).stem, graph)
    with phase("importing torch's compiler"):
        from graphopt.capture import capture, capture_forward
    with phase(f"making {name}"):
        example = load_example(name)
    with (
        phase(f"capturing {example.name}"),
        mode(example, no_grad=no_grad),
        blaming_inputs(example),
    ):
        if forward:
            graph = capture_forward(example.model, example.args, example.kwargs)
            return Subject(example.name, graph, example)
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


def rewrite(
    subject: Subject, spec: str, mesh: Mapping[str, int] | None = None
) -> tuple[Graph, tuple[PassStep, ...]]:
    """Run the passes of `spec`: on a copy of the graph, or in the capture of the model's forward.

    Parameters may be replaced in the graph; the model stays as it is.

    Args:
        subject: what to work on.
        spec: in the spec language.
        mesh: the ranks to plan for; none of them has to be there.
    """
    sizes = mesh or {}
    pipeline = Pipeline.parse(spec)
    example = subject.example
    if example is None or not pipeline.on_forward:
        graph = subject.graph.copy()
        with phase(f"running {spec}"):
            return graph, pipeline.run(graph, PassContext(mesh=sizes))
    from graphopt.capture import capture
    from graphopt.model.forward_passes import ForwardPasses
    from graphopt.model.parametrize import named_parameters

    ctx = PassContext(mesh=sizes, parameters=named_parameters(example.model))
    with phase(f"running {spec}"):
        if subject.graph.level is Level.FORWARD:
            graph = subject.graph.copy()
            return graph, pipeline.run(graph, ctx)
        early = ForwardPasses(pipeline, ctx, "structure")
        no_grad = subject.graph.level is Level.INFERENCE
        with mode(example, no_grad=no_grad):
            captured = capture(example.model, example.args, example.kwargs, rewrite=early.rewriter)
        return captured.graph, pipeline.run(captured.graph, ctx, earlier=early.steps)


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
