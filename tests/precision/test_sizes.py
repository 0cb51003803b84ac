"""Lower precision of graphs whose sizes are symbols."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.analysis import gradient_order
from graphopt.capture import capture
from graphopt.passbase import PassContext
from graphopt.passes.precision import Precision
from graphopt.pipeline import Pipeline
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.precision.test_pass import QUICK
from tests.support.applying import GOLDEN
from tests.support.sizes import Tagger, guards_of, outputs_equal, symbolic, tokens, trained_equal

PROPAGATED = "precision{policy=tf,cost=roofline}"


def test_golden_with_gradients_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)
    graph = symbolic("tagger")
    spec = "cleanup,precision{cost=roofline},schedule,group_gradients{link=10gbe}"
    Pipeline.parse(spec).run(graph, PassContext(mesh={"dp": 2}))
    verify(graph, full=True)
    text = print_graph(graph)
    assert text == (GOLDEN / "precision.sizes.gopt").read_text()
    assert print_graph(parse_graph(text)) == text


SPECS = (
    PROPAGATED,
    f"cleanup,{PROPAGATED}",
    "precision{policy=tf,cost=roofline,format=fp16}",
    "precision{format=mxfp8}",
    "precision{format=float8}",
    "precision{format=float8,granularity=row}",
    "precision{format=flex16}",
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SPECS), st.integers(2, 9), st.integers(2, 70))
def test_a_graph_of_these_sizes_is_lowered_alike(spec: str, batch: int, length: int) -> None:
    outputs_equal("tagger", spec, {"x.0": batch, "x.1": length})


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SPECS), st.integers(2, 5), st.integers(9, 14), st.integers(9, 14))
def test_images_too(spec: str, batch: int, height: int, width: int) -> None:
    if "row" not in spec:  # convolutions contract several axes
        outputs_equal("images", spec, {"x.0": batch, "x.2": height, "x.3": width})


def test_what_is_lowered_is_decided_at_the_captured_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)
    graph = symbolic("tagger")
    before = guards_of(graph)
    outcome = Precision(cost="roofline").apply(graph, PassContext())
    ids = tokens(4, 6)
    static = Precision(cost="roofline").apply(capture(Tagger(), (ids,)).graph, PassContext())
    assert outcome.applied
    assert [a.site for a in outcome.applied] == [a.site for a in static.applied]
    assert guards_of(graph) == before


def test_steps_with_scaled_gradients_take_three_captures() -> None:
    spec = "cleanup,precision{policy=tf,cost=roofline,format=fp16}"
    batches = [tokens(*size) for size in ((4, 6), (4, 9), (3, 9), (6, 13), (2, 40))]
    assert trained_equal(Tagger, spec, batches).made == 3
