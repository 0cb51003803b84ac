"""Both passes on captured models of the corpus, bit by bit or within their numerics class."""

from __future__ import annotations

import pytest

from graphopt.passbase import PassContext
from graphopt.passes.cleanup import Cleanup
from graphopt.passes.fold_inference import FoldInference
from graphopt.testing import assert_same, run_graph
from graphopt.verify import verify
from tests.support.applying import targets
from tests.support.captures import captured

pytestmark = pytest.mark.corpus

JOINT = [
    "resnet",
    "transformer_encoder",
    "tied_language_model",
    "checkpointed",
    "in_place",
    "autocast",
    "parametrised",
]


@pytest.mark.parametrize("name", JOINT)
def test_cleanup_keeps_every_bit_and_shortens_every_step(name: str) -> None:
    graph, inputs = captured(name, training=True)
    size, expected = len(graph), run_graph(graph, inputs)
    Cleanup().apply(graph, PassContext())
    verify(graph, full=True)
    assert_same(expected, run_graph(graph, inputs), Cleanup.numerics, graph.signature)
    assert len(graph) < size
    assert not Cleanup().apply(graph, PassContext()).changed


@pytest.mark.parametrize(("name", "norms"), [("resnet", 9), ("unet", 5), ("mobilenet", 7)])
def test_every_batch_norm_of_a_convolutional_network_is_folded(name: str, norms: int) -> None:
    graph, inputs = captured(name, training=False)
    expected = run_graph(graph, inputs)
    outcome = FoldInference().apply(graph, PassContext())
    assert sum(item.what == "folded into the layer before" for item in outcome.applied) == norms
    assert not [target for target in targets(graph) if "batch_norm" in target]
    assert_same(expected, run_graph(graph, inputs), FoldInference.numerics, graph.signature)
