"""A graph that is run with what is still read alone gives what torch's interpreter gives."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from torch import Tensor, fx

from graphopt.graph import Graph
from graphopt.model.comparison import same
from graphopt.model.watched import Late, Watched
from graphopt.testing import inputs_for, joint_graphs


@given(joint_graphs())
def test_results_are_those_of_the_interpreter(graph: Graph) -> None:
    values = inputs_for(graph, 0)
    taken: dict[int, Any] = {}

    def take(position: int, value: Any) -> None:
        assert position not in taken
        taken[position] = value

    def late(value: Tensor) -> Late:
        return Late(value.clone)

    watched = Watched(graph.module, graph.fx, take)
    with torch.no_grad():
        torch.manual_seed(0)
        wanted = fx.Interpreter(graph.module).run(*(v.clone() for v in values))
        torch.manual_seed(0)
        watched.run(*map(late, values))
    assert sorted(taken) == list(range(len(wanted)))
    assert all(same(taken[i], value) for i, value in enumerate(wanted))
    assert not watched.untrue


def test_nothing_is_held_beside_what_is_read() -> None:
    """A result is gone once it was taken up, and a late input is made for each reader."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    double = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2))
    triple = graph.call_function(torch.ops.aten.add.Tensor, (double, x))
    graph.output((double, triple, 3))
    made: list[int] = []

    def make() -> Tensor:
        made.append(1)
        return torch.ones(2)

    taken: list[Any] = []
    watched = Watched(torch.nn.Module(), graph, lambda i, v: taken.append((i, v)))
    watched.run(Late(make))
    assert len(made) == 2
    assert double not in watched.env
    assert triple not in watched.env
    assert [i for i, _ in taken] == [0, 1, 2]
    assert torch.equal(taken[1][1], torch.full((2,), 3.0))


def test_what_is_written_later_is_taken_up_later() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2))
    z = graph.call_function(torch.ops.aten.add_.Tensor, (y, 1))
    graph.output((y, z))
    taken: dict[int, Tensor] = {}
    Watched(torch.nn.Module(), graph, taken.__setitem__).run(torch.ones(2))
    assert torch.equal(taken[0], torch.full((2,), 3.0))
