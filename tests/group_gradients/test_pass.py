"""The rewrite of `group_gradients`, without ranks: its text, its plan, what it declines."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.analysis.linearity import linear_in_tangents
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.passbase import PassContext
from graphopt.passes.cleanup import Cleanup
from graphopt.passes.group_gradients import GroupGradients
from graphopt.plan import Role
from graphopt.plan.group_gradients import Reduction
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def _graph() -> Graph:
    graph = parse_graph((GOLDEN / "schedule.before.gopt").read_text())
    Cleanup().apply(graph, PassContext())
    return graph


def _grouped(**options: str) -> Graph:
    graph = _graph()
    GroupGradients(link="10gbe", **options).apply(graph, PassContext(mesh={"dp": 4}))
    verify(graph, full=True)
    return graph


@pytest.mark.parametrize("wire", ["native", "bf16", "int32"])
def test_golden(wire: str) -> None:
    text = print_graph(_grouped(wire=wire))
    assert text == (GOLDEN / f"group_gradients.{wire}.gopt").read_text()
    assert print_graph(parse_graph(text)) == text


def test_the_plan_part_names_what_the_graph_returns() -> None:
    graph = _graph()
    pass_ = GroupGradients(link="10gbe")
    reduction = pass_.apply(graph, PassContext(mesh={"dp": 4})).part
    assert isinstance(reduction, Reduction)
    names = [name for group in reduction.grouping.groups for name in group.names]
    assert sorted(names) == sorted(graph.signature.names(Role.GRAD))
    assert sorted(names) == sorted(graph.signature.names(Role.LOCAL))
    assert reduction.scale == 0.25
    assert all(c.finish >= reduction.grouping.finish for c in reduction.grouping.candidates)
    assert reduction.grouping.bound <= reduction.grouping.finish


def test_backward_of_an_mlp_is_linear() -> None:
    assert linear_in_tangents(_graph())


def test_one_rank_is_declined() -> None:
    graph = _graph()
    before = print_graph(graph)
    outcome = GroupGradients().apply(graph, PassContext())
    assert [d.reason for d in outcome.declined] == ["one-rank"]
    assert print_graph(graph) == before


def test_unknown_link() -> None:
    with pytest.raises(ArgumentError, match="10gb"):
        GroupGradients(link="10gb").apply(_graph(), PassContext(mesh={"dp": 2}))
