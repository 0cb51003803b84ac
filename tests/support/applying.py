"""One application of a pass, held against everything that a test of any pass wants to know."""

from __future__ import annotations

from pathlib import Path

from graphopt.graph import Graph
from graphopt.passbase import Outcome, Pass, PassContext
from graphopt.testing import assert_same, inputs_for, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden"


def applied(pass_: Pass, graph: Graph) -> Outcome:
    """Apply a pass: results stay within its numerics class, the graph legal, and once is enough."""
    verify(graph, full=True)
    inputs = inputs_for(graph)
    expected = run_graph(graph, inputs)
    outcome = pass_.apply(graph, PassContext())
    verify(graph, full=True)
    assert_same(expected, run_graph(graph, inputs), pass_.numerics, graph.signature)
    text = print_graph(graph)
    again = pass_.apply(graph, PassContext())
    assert again.applied == ()
    assert again.declined == outcome.declined
    assert print_graph(graph) == text
    return outcome


def targets(graph: Graph) -> list[str]:
    """The operators of a graph in order, without namespace and overload."""
    return [str(n.target).split(".")[-2] for n in graph.operators if "getitem" not in str(n.target)]


def reasons(outcome: Outcome) -> list[tuple[str, str]]:
    """Site and reason of everything that was declined."""
    return [(item.site, item.reason) for item in outcome.declined]


def golden(pass_: Pass) -> None:
    """The pass turns ``<name>.before.gopt`` into ``<name>.after.gopt``."""
    graph = parse_graph((GOLDEN / f"{pass_.name}.before.gopt").read_text())
    applied(pass_, graph)
    assert print_graph(graph) == (GOLDEN / f"{pass_.name}.after.gopt").read_text()
