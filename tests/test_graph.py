"""The graph's own bookkeeping: the side table, cached analyses, copies."""

from __future__ import annotations

import torch
from torch import nn

from graphopt.capture import capture
from graphopt.graph import Annotation, Graph

COST: Annotation[int] = Annotation("cost")


def _graph() -> Graph:
    return capture(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (torch.randn(2, 3),)).graph


def test_annotations_survive_copies_and_die_with_their_node() -> None:
    graph = _graph()
    first, *_, last = graph.operators
    graph.annotate(first, COST, 7)
    graph.annotate(last, COST, 9)
    copy = graph.copy()
    assert [copy.annotation(n, COST) for n in copy.operators] == [
        graph.annotation(n, COST) for n in graph.operators
    ]
    extra = graph.fx.call_function(torch.ops.aten.neg.default, (first,))
    graph.annotate(extra, COST, 1)
    graph.fx.erase_node(extra)
    graph.changed()
    assert graph.annotation(extra, COST) is None
    assert graph.annotation(first, COST) == 7


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
