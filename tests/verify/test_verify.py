"""The table of invariants: legal graphs pass, and for each row graphs that break exactly it."""

from __future__ import annotations

import pytest

from graphopt.errors import InvariantError
from graphopt.verify import INVARIANTS, verify
from tests.support import broken_form, broken_step
from tests.support.breaking import BROKEN
from tests.support.graphs import inference_graph, linear_graph
from tests.support.legal_graphs import LEGAL

assert broken_form, broken_step  # importing them fills BROKEN
COST = {invariant.name: invariant.cost for invariant in INVARIANTS}


@pytest.mark.parametrize("make", [linear_graph, inference_graph, *LEGAL], ids=lambda f: f.__name__)
def test_legal_graphs_pass(make):
    graph = make()
    before = str(graph.fx)
    verify(graph)
    verify(graph, full=True)
    assert str(graph.fx) == before


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case.invariant}-{case.__name__}")
def test_broken_graphs_are_refused_for_their_row(case):
    graph, node, sentence = case()
    with pytest.raises(InvariantError) as caught:
        verify(graph, full=COST[case.invariant] == "full")
    message = caught.value.message
    assert message.startswith(f"invariant {case.invariant!r} is broken: ")
    assert sentence in message
    if node:
        assert f"node {node!r}" in message


@pytest.mark.parametrize("case", [c for c in BROKEN if COST[c.invariant] == "full"])
def test_full_rows_are_not_checked_by_default(case):
    verify(case()[0])


def test_every_row_has_a_graph_that_breaks_it():
    assert {case.invariant for case in BROKEN} == set(COST)


def test_names_are_stable_and_meanings_are_sentences():
    assert len(COST) == len(INVARIANTS)
    for invariant in INVARIANTS:
        assert invariant.meaning.endswith(".")
        assert invariant.name == invariant.name.lower().replace("_", "-")


def test_an_error_shows_the_call_the_users_line_and_how_many_more():
    graph = linear_graph()
    for name in ("t", "mm_1"):
        (node,) = (n for n in graph.nodes if n.name == name)
        del node.meta["val"]
        node.meta["stack_trace"] = 'File "model.py", line 3, in forward\n    return x @ w\n'
    with pytest.raises(InvariantError) as caught:
        verify(graph)
    assert "node 't': it has no `val` in its meta (and 1 more)" in caught.value.message
    assert "call_function[target=torch.ops.aten.t.default]" in caught.value.where
    assert "model.py:3: return x @ w" in caught.value.where
