"""Which expressions of weights are computed once, and which are not."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.graph import Graph, Level
from graphopt.passes.fold_inference import FoldInference
from graphopt.plan import Role
from tests.support.applying import applied, reasons, targets
from tests.support.graphs import Builder, aten, output


def inference(b: Builder, y: fx.Node) -> Graph:
    return b.build({output(): y}, Level.INFERENCE)


def frozen_parents(graph: Graph) -> list[str]:
    return [n.args[0].name for n in graph.operators if "frozen" in str(n.target)]


def test_expressions_of_weights_are_frozen_as_a_whole() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (4, 4)), b.input(Role.INPUT, "0", (4, 4))
    expression = b.call(aten.tanh.default, b.call(aten.mul.Tensor, b.call(aten.exp.default, w), 2))
    graph = inference(b, b.call(aten.mm.default, x, expression))
    outcome = applied(FoldInference(), graph)
    assert frozen_parents(graph) == ["tanh"]
    assert [(a.site, a.numbers) for a in outcome.applied] == [("w", {"bytes": 64})]


def test_views_read_the_frozen_value() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (4, 4)), b.input(Role.INPUT, "0", (4, 4))
    cast = b.call(aten._to_copy.default, w, dtype=torch.float64)
    wide = b.call(aten._to_copy.default, x, dtype=torch.float64)
    graph = inference(b, b.call(aten.mm.default, wide, b.call(aten.t.default, cast)))
    applied(FoldInference(), graph)
    assert frozen_parents(graph) == ["_to_copy"]
    assert targets(graph)[-2:] == ["t", "mm"]


def test_weights_that_layers_read_are_marked_as_they_are() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (4, 4)), b.input(Role.INPUT, "0", (4, 4))
    graph = inference(b, b.call(aten.mm.default, x, b.call(aten.t.default, w)))
    outcome = applied(FoldInference(), graph)
    assert [(a.site, a.what) for a in outcome.applied] == [("w", "kept for its layers")]
    assert outcome.declined == ()
    assert targets(graph) == ["frozen", "t", "mm"]


def test_returned_expression_is_new_at_each_call() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4, 4))
    twice = b.call(aten.mul.Tensor, b.call(aten.exp.default, w), 2)
    graph = inference(b, b.call(aten.view.default, twice, [16]))
    assert reasons(applied(FoldInference(), graph)) == [("mul", "escapes")]
    assert frozen_parents(graph) == ["exp"]


def test_expression_that_is_larger_than_its_weights_is_not_kept() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (1024, 1)), b.input(Role.INPUT, "0", (1024, 1024))
    outer = b.call(aten.mul.Tensor, w, b.call(aten.t.default, b.call(aten.exp.default, w)))
    graph = inference(b, b.call(aten.mm.default, x, outer))
    outcome = applied(FoldInference(), graph)
    assert reasons(outcome) == [("mul", "too-large")]
    assert frozen_parents(graph) == ["exp"]


def test_random_and_unknown_operators_are_not_frozen() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (4, 4)), b.input(Role.INPUT, "0", (4, 4))
    noisy = b.call(aten.mul.Tensor, w, b.call(aten.rand_like.default, w))
    graph = inference(b, b.call(aten.mm.default, x, noisy))
    outcome = applied(FoldInference(), graph)
    assert outcome.applied == ()


def test_constants_without_weights_are_not_for_this_pass() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,))
    constant = b.call(aten.exp.default, b.call(aten.full.default, [4], 1.0))
    graph = inference(b, b.call(aten.neg.default, x))
    graph.set_outputs({output("0"): graph.outputs[0], output("1"): constant})
    outcome = applied(FoldInference(), graph)
    assert (outcome.applied, outcome.declined) == ((), ())


def test_tensor_that_the_model_may_replace_is_not_frozen() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (4,)), b.input(Role.INPUT, "0", (4,))
    mask = b.constant("mask", torch.ones(4))
    graph = inference(b, b.call(aten.add.Tensor, x, b.call(aten.mul.Tensor, w, mask)))
    assert applied(FoldInference(), graph).applied == ()
