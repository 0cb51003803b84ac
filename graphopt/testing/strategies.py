"""Hypothesis strategies that generate whole training steps as graphs, without capturing a model.

Building a graph takes a few milliseconds, capturing a model a hundred times that. Failures shrink
towards few steps, early kinds of the catalogue and small tapes.
"""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import strategies as st

from graphopt.errors import ArgumentError
from graphopt.graph import Graph, Level
from graphopt.testing.ops_catalogue import CATALOGUE
from graphopt.testing.program import Instruction, Program, build

_TAPE = 6
_SHAPES = ((2, 3), (3,), (), (1, 2), (2, 1, 3), (2, 2, 4, 4), (4, 4))


def programs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE)
) -> st.SearchStrategy[Program]:
    """Programs of at most `max_steps` steps over the given kinds of the catalogue."""
    if unknown := sorted(set(kinds) - set(CATALOGUE)):
        raise ArgumentError(
            f"unknown kinds of operators: {', '.join(unknown)}",
            hint=f"one of {', '.join(CATALOGUE)}",
        )
    tape = st.binary(max_size=_TAPE).map(tuple)  # one choice to shrink per step, not six
    return st.builds(
        Program,
        steps=st.lists(
            st.builds(Instruction, st.sampled_from(list(kinds)), tape), max_size=max_steps
        ).map(tuple),
        inputs=st.lists(st.sampled_from(_SHAPES), min_size=1, max_size=3).map(tuple),
        outputs=st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple),
        input_grads=st.booleans(),
    )


def joint_graphs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE)
) -> st.SearchStrategy[Graph]:
    """Training steps: forward and backward in one graph, one tangent per differentiable output."""
    return programs(max_steps=max_steps, kinds=kinds).map(lambda p: build(p, Level.JOINT))


def forward_graphs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE)
) -> st.SearchStrategy[Graph]:
    """Graphs in front of autograd; batch norm uses its running statistics."""
    return programs(max_steps=max_steps, kinds=kinds).map(lambda p: build(p, Level.FORWARD))


def inference_graphs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE)
) -> st.SearchStrategy[Graph]:
    """Graphs without backward; batch norm uses its running statistics."""
    return programs(max_steps=max_steps, kinds=kinds).map(lambda p: build(p, Level.INFERENCE))
