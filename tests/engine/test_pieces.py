"""The eager backend writes pieces in place where no value can tell, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.backends.pieces import write_in_place

aten = torch.ops.aten
ROWS = 5


def _loop(x: Tensor, program: list[tuple[str, int, int]]) -> tuple[Tensor, ...]:
    """Statements about the rows of `x`: what a user may write around an assignment to a piece."""
    state, kept = x * 1.5, []
    for action, i, j in program:
        if action == "row":
            state[i] = state[j].clone().sin() + state.sum(0) / ROWS
        elif action == "copy":
            state[i] = state[j]
        elif action == "shift":
            state[1:] = state[:-1].clone() * 2
        elif action == "column":
            state[:, i % x.shape[1]] = state[:, j % x.shape[1]].clone().cos()
        elif action == "index":
            state[torch.tensor([i, j])] = state[torch.tensor([j, i])] + x[0]
        elif action == "diagonal":
            state.diagonal().copy_(x.diagonal() * i)
        elif action == "corner":
            state[1:, i % x.shape[1]] = state[1:, j % x.shape[1]].clone() + x[0, 0]
        elif action == "neighbour":  # reads and writes one memory
            state[i].copy_(state[j])
        elif action == "overlap":
            state[:-1] = state.roll(1, 0)[1:] + state[1:].clone()
        elif action == "keep":  # the old value is read later
            kept.append(state.clone())
        elif action == "view":
            kept.append(state[i].clone() * state[j].clone())
        elif action == "new":
            state = state.tanh().clone()
    return (state, *kept)


ACTIONS = [
    *("row", "copy", "shift", "column", "index", "diagonal"),
    *("corner", "neighbour", "overlap", "keep", "view", "new"),
]
programs = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)),
    min_size=1,
    max_size=6,
)


@given(program=programs)
def test_functional_graphs_compute_the_same(program: list[tuple[str, int, int]]) -> None:
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    module = _functional(lambda v: _loop(v, program), x)
    expected, before = module(x), x.clone()
    write_in_place(module.graph)
    module.graph.lint()
    module.recompile()
    for _ in range(2):
        for a, b in zip(module(x), expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(x, before)


@settings(max_examples=12)
@given(program=programs)
def test_models_have_the_gradients_of_eager(program: list[tuple[str, int, int]]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return _loop(x * self.weight, program)

    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    plain = Model()
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager", verify="off")
    for model in (plain, ours):
        loss = sum((y**2).sum() for y in model(x))
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)


def test_a_loop_over_rows_copies_once() -> None:
    def sweep(state: Tensor) -> Tensor:
        state = state.clone()
        for i in range(ROWS):
            state[i] = state.sum(0).sin()
        return state

    module = _functional(sweep, torch.ones(ROWS, 4))
    assert _count(module, aten.select_scatter.default) == ROWS
    write_in_place(module.graph)
    assert _count(module, aten.select_scatter.default) == 0
    assert _count(module, aten.copy_.default) == ROWS


def test_a_padded_circle_copies_nothing_else() -> None:
    """Circular padding writes the middle, then the ends from the middle."""

    def pad(x: Tensor) -> Tensor:
        return nn.functional.pad(x[None], (2, 1), mode="circular")

    module = _functional(pad, torch.randn(ROWS, 4))
    x = torch.randn(ROWS, 4)
    expected = module(x)
    write_in_place(module.graph)
    module.recompile()
    assert torch.equal(module(x), expected)
    assert _count(module, aten.slice_scatter.default) == 0
    assert _count(module, aten.copy.default) == 0
    assert _count(module, aten.copy_.default) == 3


def test_a_corner_is_written_through_both_views() -> None:
    def write(x: Tensor) -> Tensor:
        y = x.sin()
        y[1:, 0] = x[1:, 1]
        return y

    module = _functional(write, torch.randn(ROWS, 4))
    x = torch.randn(ROWS, 4)
    expected = module(x)
    write_in_place(module.graph)
    module.recompile()
    assert torch.equal(module(x), expected)
    assert _count(module, aten.select_scatter.default) == 0
    assert _count(module, aten.slice_scatter.default) == 0


KEPT: dict[str, Callable[[Tensor], object]] = {
    "an input": lambda x: x.select_scatter(x[0] * 2, 0, 1),
    "a view of an input": lambda x: x.view(-1).slice_scatter(x[0], 0, 0, 4),
    "a value that is returned": lambda x: ((y := x.sin()), y.select_scatter(x[0], 0, 1)),
    "a value whose view is returned": lambda x: ((y := x.sin())[2], y.select_scatter(x[0], 0, 1)),
    "a value that is read later": lambda x: ((y := x.sin()).select_scatter(x[0], 0, 1) + y,),
    "a piece of itself": lambda x: (y := x.sin()).slice_scatter(y[:-1], 0, 1, ROWS),
    "an expanded value": lambda x: x[0].sin().expand(ROWS, 4).select_scatter(x[1], 0, 1),
    "a transposed value": lambda x: x.sin().t().select_scatter(x[:, 0], 0, 1),
}


@pytest.mark.parametrize("case", sorted(KEPT))
def test_memory_that_somebody_reads_is_left_alone(case: str) -> None:
    x = torch.randn(ROWS, 4)
    module = _functional(KEPT[case], x)
    expected, before = module(x), len(module.graph.nodes)
    write_in_place(module.graph)
    module.recompile()
    if case != "a transposed value":  # which may be written to where the layout stays
        assert len(module.graph.nodes) == before
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def _functional(function: Callable[[Tensor], object], x: Tensor) -> fx.GraphModule:
    module = make_fx(torch.func.functionalize(function), tracing_mode="fake")(x)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _count(module: fx.GraphModule, target: object) -> int:
    return sum(node.target is target for node in module.graph.nodes)


def test_the_module_stays_as_it_is() -> None:
    """Others make functions of one graph, too: stages add their gradients up in a copy of it."""

    def add(x: Tensor) -> Tensor:
        y = x * 2
        return y + x.sin()

    module = make_fx(add)(torch.ones(3))
    before = module.graph.python_code("self").src
    assert torch.equal(boxed(module)([torch.ones(3)]), add(torch.ones(3)))
    assert module.graph.python_code("self").src == before
