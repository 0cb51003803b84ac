"""Lower precision together with the methods before and after it, as text."""

from __future__ import annotations

import pytest

from graphopt.analysis import gradient_order
from graphopt.graph import value_of
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.plan import Role
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.precision.test_pass import QUICK
from tests.support.applying import GOLDEN

SPECS = {
    "kfac": "cleanup,kfac{damping=0.1},precision{cost=roofline}",
    "grouped": "cleanup,precision{cost=roofline},schedule,group_gradients{link=10gbe}",
    "scaled": "cleanup,precision{format=fp16,cost=roofline},group_gradients{link=10gbe}",
}


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)


@pytest.mark.parametrize("name", SPECS)
def test_golden(name: str) -> None:
    graph = parse_graph((GOLDEN / "schedule.before.gopt").read_text())
    Pipeline.parse(SPECS[name]).run(graph, PassContext(mesh={"dp": 2}), verify="full")
    verify(graph, full=True)
    text = print_graph(graph)
    assert text == (GOLDEN / f"precision.{name}.gopt").read_text()
    assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize("name", SPECS)
def test_what_travels_and_what_statistics_are_made_of_is_float32(name: str) -> None:
    graph = parse_graph((GOLDEN / "schedule.before.gopt").read_text())
    Pipeline.parse(SPECS[name]).run(graph, PassContext(mesh={"dp": 2}))
    slots = zip(graph.signature.outputs, graph.outputs, strict=True)
    outside = [n for s, n in slots if s.role in (Role.GRAD, Role.LOCAL, Role.AUX, Role.OUTPUT)]
    assert {str(value_of(node).dtype) for node in outside} == {"torch.float32"}
