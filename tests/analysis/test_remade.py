"""A joint graph whose backward makes copies anew computes the same and holds less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

from graphopt.analysis.remade import remade_in_backward
from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.model.comparison import same
from graphopt.testing import inputs_for, joint_graphs
from tests.support.bytes import most


class Grouped(nn.Module):
    """Attention with fewer keys than queries, behind a mask of positions."""

    def __init__(self, copies: int, masked: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16 * copies), nn.Linear(16, 16)
        self.copies, self.masked = copies, masked

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.copies, 16).transpose(1, 2)
        key = self.key(x)[:, None].expand(-1, self.copies, -1, -1).contiguous()
        scores = query @ key.transpose(2, 3)
        if self.masked:
            places = torch.arange(length)
            scores = torch.where(places[:, None] >= places, scores, -1e4)
        return (scores.softmax(-1) @ key).sin().mean((1, 2, 3))


@given(joint_graphs())
def test_results_of_any_graph_stay(graph: Graph) -> None:
    again = remade_in_backward(graph.fx)
    again.lint()
    values = inputs_for(graph, 0)
    with torch.no_grad():
        torch.manual_seed(0)
        wanted = fx.Interpreter(graph.module).run(*(v.clone() for v in values))
        torch.manual_seed(0)
        found = fx.Interpreter(graph.module, graph=again).run(*(v.clone() for v in values))
    assert all(map(same, wanted, found))


@pytest.mark.parametrize("copies", [1, 4])
def test_results_stay_and_so_do_inputs_and_names(copies: int) -> None:
    captured = capture(Grouped(copies, masked=True), (torch.randn(2, 5, 16),))
    graph = captured.graph
    again = remade_in_backward(graph.fx)
    again.lint()
    names = [node.name for node in graph.fx.nodes]
    assert set(names) <= {node.name for node in again.nodes}
    assert len(again.nodes) >= len(names) + (copies > 1)
    values = [*captured.inputs, torch.randn(2)]
    with torch.no_grad():
        wanted = fx.Interpreter(graph.module).run(*values)
        found = fx.Interpreter(graph.module, graph=again).run(*values)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_what_is_no_larger_than_its_source_is_kept() -> None:
    captured = capture(Grouped(1, masked=False), (torch.randn(2, 4, 16),))
    assert len(remade_in_backward(captured.graph.fx).nodes) == len(captured.graph.nodes)


@pytest.mark.parametrize("masked", [False, True])
def test_less_is_held(masked: bool) -> None:
    captured = capture(Grouped(8, masked), (torch.randn(4, 32, 16),))
    graph = captured.graph
    values = [*captured.inputs, torch.randn(4)]

    def run(made: fx.Graph) -> int:
        with torch.no_grad():
            return most(lambda: fx.Interpreter(graph.module, graph=made).run(*values))

    copies = 4 * 8 * 32 * 16 * 4
    assert run(graph.fx) - run(remade_in_backward(graph.fx)) >= copies // 2
