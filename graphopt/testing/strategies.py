"""Hypothesis strategies that generate whole training steps as graphs, without capturing a model.

Building a graph takes a few milliseconds, capturing a model a hundred times that. Failures shrink
towards few steps, early kinds of the catalogue and small tapes.
"""

from __future__ import annotations

from collections.abc import Collection

from graphopt.errors import ArgumentError
from graphopt.extras import extra
from graphopt.graph import Graph, Level
from graphopt.testing.ops_catalogue import CATALOGUE
from graphopt.testing.program import Instruction, Program, build
from graphopt.testing.recording import NotWritten

with extra("testing", "what generates graphs"):
    from hypothesis import reject
    from hypothesis import strategies as st

_TAPE = 6
_SHAPES = ((2, 3), (3,), (), (1, 2), (2, 1, 3), (2, 2, 4, 4), (4, 4))
_FIRST = (("batch", 3), ("batch", "length", 3), ("batch", 2, "length", 4), ("batch",))
_SYMBOLIC_SHAPES = (*_FIRST, (3, "batch"), (3,), (2, 3), (1, 2), (4, 4))


def programs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE), symbolic: bool = False
) -> st.SearchStrategy[Program]:
    """Programs of at most `max_steps` steps over the given kinds of the catalogue.

    Args:
        max_steps: at most so many.
        kinds: of the steps.
        symbolic: whether sizes vary: those of the batch, and of lengths.
    """
    if unknown := sorted(set(kinds) - set(CATALOGUE)):
        raise ArgumentError(
            f"unknown kinds of operators: {', '.join(unknown)}",
            hint=f"one of {', '.join(CATALOGUE)}",
        )
    inputs = st.lists(st.sampled_from(_SHAPES), min_size=1, max_size=3).map(tuple)
    if symbolic:
        others = st.lists(st.sampled_from(_SYMBOLIC_SHAPES), max_size=2).map(tuple)
        inputs = st.builds(lambda one, more: (one, *more), st.sampled_from(_FIRST), others)
    tape = st.binary(max_size=_TAPE).map(tuple)  # one choice to shrink per step, not six
    return st.builds(
        Program,
        steps=st.lists(
            st.builds(Instruction, st.sampled_from(list(kinds)), tape), max_size=max_steps
        ).map(tuple),
        inputs=inputs,
        outputs=st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple),
        input_grads=st.booleans(),
    )


def joint_graphs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE), symbolic: bool = False
) -> st.SearchStrategy[Graph]:
    """Training steps: forward and backward in one graph, one tangent per differentiable output."""
    return _graphs(programs(max_steps=max_steps, kinds=kinds, symbolic=symbolic), Level.JOINT)


def forward_graphs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE), symbolic: bool = False
) -> st.SearchStrategy[Graph]:
    """Graphs in front of autograd; batch norm uses its running statistics."""
    return _graphs(programs(max_steps=max_steps, kinds=kinds, symbolic=symbolic), Level.FORWARD)


def inference_graphs(
    *, max_steps: int = 8, kinds: Collection[str] = tuple(CATALOGUE), symbolic: bool = False
) -> st.SearchStrategy[Graph]:
    """Graphs without backward; batch norm uses its running statistics."""
    return _graphs(programs(max_steps=max_steps, kinds=kinds, symbolic=symbolic), Level.INFERENCE)


def _graphs(of: st.SearchStrategy[Program], level: Level) -> st.SearchStrategy[Graph]:
    def built(program: Program) -> Graph:
        try:
            return build(program, level)
        except NotWritten:
            reject()

    return of.map(built)
