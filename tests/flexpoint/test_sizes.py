"""Flex tensors of graphs whose sizes are symbols: one exponent each, whatever the size."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.passbase import PassContext
from graphopt.passes.flexpoint import Flexpoint
from graphopt.text import parse_graph, print_graph
from tests.support.applying import GOLDEN
from tests.support.sizes import (
    Images,
    Tagger,
    images,
    outputs_equal,
    symbolic,
    tokens,
    trained_equal,
)


def test_golden() -> None:
    graph = symbolic("images", training=False)
    Flexpoint().apply(graph, PassContext())
    text = print_graph(graph)
    assert text == (GOLDEN / "flexpoint.sizes.gopt").read_text()
    assert print_graph(parse_graph(text)) == text


SPECS = ("flexpoint", "flexpoint{mantissa=10,autoflex=current}", "flexpoint{rounding=stochastic}")


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SPECS), st.integers(2, 9), st.integers(2, 40))
def test_a_graph_of_these_sizes_becomes_the_same(spec: str, batch: int, length: int) -> None:
    outputs_equal("tagger", spec, {"x.0": batch, "x.1": length})


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(2, 5), st.integers(9, 14), st.integers(9, 14))
def test_images_too(batch: int, height: int, width: int) -> None:
    outputs_equal("images", "cleanup,flexpoint", {"x.0": batch, "x.2": height, "x.3": width})


def test_all_sizes_share_exponents() -> None:
    """The second capture goes on with what the first one has seen, as each further size does."""
    batches = [tokens(*size) for size in ((4, 6), (4, 9), (3, 9), (6, 13), (3, 5))]
    assert trained_equal(Tagger, "flexpoint", batches).made == 3


def test_images_of_declared_sizes_take_one_capture() -> None:
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    batches = [images(*size) for size in ((4, 9, 11), (3, 12, 10))]
    assert trained_equal(Images, "flexpoint", batches, dynamic=dynamic).made == 1
