"""A program: the plain value that a generated graph is built from, and how it is built.

A generated graph obeys everything a captured one does: placeholders first and in order of role, one
node per output slot, forward outputs before gradients, `meta["val"]` and `meta["partitioner_tag"]`
on every node, functional ATen operators. Its backward half is the true derivative of its forward
half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.graph import Graph, Level
from graphopt.testing.builder import SYMBOLS, Builder, Choices, is_fixed
from graphopt.testing.ops_catalogue import CATALOGUE
from graphopt.testing.recording import Recorder


@dataclass(frozen=True)
class Instruction:
    """One layer or expression of a program: a kind of the catalogue and the tape that it reads."""

    kind: str
    tape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """What a graph is generated from; every value of this type means a valid graph.

    Attributes:
        steps: layers and expressions, in order.
        inputs: shapes of the plain inputs that exist from the start; ``"batch"`` and ``"length"``
            in them are sizes that vary.
        outputs: which results are returned; ``0`` is the most recent.
        input_grads: whether floating inputs want gradients; they do where nothing else does.
    """

    steps: tuple[Instruction, ...] = ()
    inputs: tuple[tuple[int | str, ...], ...] = ((2, 3),)
    outputs: tuple[int, ...] = (0,)
    input_grads: bool = False


def build(program: Program, level: Level = Level.JOINT) -> Graph:
    """The graph that a program means: a training step, inference alone, or a forward.

    A forward is made of the ATen operators of inference, which autograd can differentiate.

    Raises:
        NotWritten: a size is an expression for which there is no node.
    """
    named = {size for shape in program.inputs for size in shape if isinstance(size, str)}
    recorder = Recorder({name: hint for name, hint in SYMBOLS.items() if name in named})
    with recorder.recording():
        outputs = _forward(program, Builder(recorder, training=level is Level.JOINT))
        differentiable = any(value.requires_grad for value in outputs)
        gradients = recorder.differentiate(outputs) if differentiable else {}
    if level is Level.JOINT and not differentiable:
        return build(replace(program, input_grads=True), level)
    return recorder.finish(outputs, gradients, level)


def _forward(program: Program, builder: Builder) -> list[Tensor]:
    for shape in program.inputs:
        builder.input(shape, requires_grad=program.input_grads)
    for index, step in enumerate(program.steps):
        builder.enter(f"{step.kind}{index}")
        made = CATALOGUE[step.kind](builder, Choices(step.tape))
        for value in (made,) if isinstance(made, Tensor) else made or ():
            builder.add(value)
    builder.enter("")
    outputs = _outputs(builder, program.outputs)
    cut_off = program.input_grads and not any(value.requires_grad for value in outputs)
    if not outputs or (builder.training and cut_off):
        value = builder.value(Choices(()), lambda v: is_fixed(*v.shape[-1:]))
        outputs.append(torch.mul(value, builder.param("scale", value.shape[-1:])))
    return outputs


def _outputs(builder: Builder, wanted: tuple[int, ...]) -> list[Tensor]:
    """The wanted ones of the results that share no memory with anything else that is visible.

    Capture never returns such aliases either: it rebuilds them outside the graph.
    """
    taken = builder.recorder.read_memory()
    free: list[Tensor] = []
    for value in builder.computed:
        memory = value.untyped_storage()._cdata
        if memory not in taken:
            taken.add(memory)
            free.append(value)
    outputs = [free[-1 - index % len(free)] for index in wanted] if free else []
    return list({id(value): value for value in outputs}.values())
