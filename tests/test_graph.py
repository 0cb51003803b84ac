"""The graph's own bookkeeping: cached analyses and edits."""

from __future__ import annotations

import torch
from torch import nn

from graphopt.capture import capture
from graphopt.graph import Graph


def _graph() -> Graph:
    return capture(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (torch.randn(2, 3),)).graph


def test_analyses_are_cached_until_the_graph_changes() -> None:
    graph, calls = _graph(), []

    def count(graph: Graph) -> int:
        calls.append(graph.version)
        return len(graph)

    assert graph.get(count) == graph.get(count) == len(graph)
    assert len(calls) == 1
    graph.changed()
    graph.get(count)
    assert len(calls) == 2


def test_an_edited_graph_runs_its_new_code() -> None:
    graph = _graph()
    before = graph.module.code
    with graph.fx.inserting_before(graph.output):
        node = graph.fx.call_function(torch.ops.aten.neg.default, (graph.outputs[0],))
    node.meta.update(graph.outputs[0].meta)
    graph.output.replace_input_with(graph.outputs[0], node)
    graph.changed()
    assert "neg" in graph.module.code
    assert "neg" not in before
