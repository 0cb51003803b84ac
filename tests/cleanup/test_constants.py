"""Which constants are computed while compiling, and which are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from graphopt.graph import Graph, Level
from graphopt.passbase import PassContext
from graphopt.passes.cleanup import Cleanup
from graphopt.plan import Role
from tests.support.applying import applied, reasons, targets
from tests.support.graphs import Builder, aten, grad, output


def plus(make: Callable[[Builder], fx.Node], size: int = 4) -> Graph:
    """``x + make()`` as an inference graph."""
    b = Builder()
    x = b.input(Role.INPUT, "0", (size, size))
    return b.build({output(): b.call(aten.add.Tensor, x, make(b))}, Level.INFERENCE)


def causal(b: Builder, size: int) -> fx.Node:
    """Zero on and below the diagonal, one above."""
    steps = b.call(aten.arange.default, size)
    rows, columns = (b.call(aten.unsqueeze.default, steps, d) for d in (1, 0))
    above = b.call(aten.lt.Tensor, rows, columns)
    return b.call(aten._to_copy.default, above, dtype=torch.float32)


def test_mask_is_computed_once() -> None:
    graph = plus(lambda b: causal(b, 4))
    outcome = applied(Cleanup(), graph)
    assert targets(graph) == ["add"]
    assert torch.equal(graph.module._folded_0, torch.ones(4, 4).triu(1))
    folded = [a for a in outcome.applied if a.what == "folded constant"]
    assert [(a.site, a.numbers) for a in folded] == [("_folded_0", {"nodes": 5, "bytes": 64})]


def test_fills_and_views_of_them_stay() -> None:
    graph = plus(
        lambda b: b.call(aten.expand.default, b.call(aten.full.default, [1, 4], 2.0), [4, 4])
    )
    outcome = applied(Cleanup(), graph)
    assert (outcome.applied, outcome.declined) == ((), ())


def test_small_constant_is_folded_below_a_large_view() -> None:
    def make(b: Builder) -> fx.Node:
        row = b.call(aten.exp.default, b.call(aten.full.default, [1, 1], 2.0))
        return b.call(aten.expand.default, row, [200, 200])

    graph = plus(make, 200)
    applied(Cleanup(), graph)
    assert targets(graph) == ["expand", "add"]
    assert graph.module._folded_0.shape == (1, 1)


def test_large_constant_is_computed_at_each_step() -> None:
    graph = plus(lambda b: causal(b, 200), 200)
    outcome = applied(Cleanup(), graph)
    assert targets(graph).count("_to_copy") == 1
    assert reasons(outcome) == [("_to_copy", "too-large")]
    assert outcome.declined[0].numbers == {"bytes": 160_000}


def test_large_intermediate_is_never_allocated() -> None:
    graph = plus(lambda b: b.call(aten.sum.default, b.call(aten.ones.default, [10_000, 10_000])))
    assert reasons(Cleanup().apply(graph, PassContext())) == []
    assert targets(graph) == ["ones", "sum", "add"]


def test_returned_constant_is_new_at_each_call() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4, 4))
    mask = causal(b, 4)
    outputs = {output("0"): b.call(aten.neg.default, x)}
    outputs[output("1")] = b.call(aten.view.default, mask, [16])
    graph = b.build(outputs, Level.INFERENCE)
    assert reasons(applied(Cleanup(), graph)) == [("_to_copy", "escapes")]
    # What it is computed from is folded all the same.
    assert targets(graph) == ["_to_copy", "neg", "view"]


def test_literal_counts_as_constant_and_the_model_s_tensor_does_not() -> None:
    for name, is_literal in (("literal", True), ("mask", False)):

        def make(b: Builder, name: str = name, is_literal: bool = is_literal) -> fx.Node:
            value = b.constant(name, torch.tensor([1.0, 2.0, 3.0, 4.0]))
            if is_literal:
                value = b.call(aten.lift_fresh_copy.default, value)
            return b.call(aten.exp.default, value)

        graph = plus(make)
        applied(Cleanup(), graph)
        assert targets(graph) == (["add"] if is_literal else ["exp", "add"])


def test_constant_of_another_machine_is_left_to_it() -> None:
    graph = plus(lambda b: b.call(aten.exp.default, b.call(aten.full.default, [4], 1.0)))
    for node in graph.operators:
        if node.target is aten.full.default:
            node.kwargs = {"device": "nowhere"}
    outcome = Cleanup().apply(graph, PassContext())
    assert reasons(outcome) == [("exp", "not-computable")]
    assert "nowhere" in outcome.declined[0].detail


def test_constant_that_depends_on_a_changed_default_is_left_alone() -> None:
    graph = plus(lambda b: b.call(aten.exp.default, b.call(aten.full.default, [4], 1.0)))
    torch.set_default_dtype(torch.float64)
    try:
        outcome = Cleanup().apply(graph, PassContext())
    finally:
        torch.set_default_dtype(torch.float32)
    assert reasons(outcome) == [("exp", "differs")]


def test_random_numbers_are_no_constant() -> None:
    graph = plus(lambda b: b.call(aten.exp.default, b.call(aten.rand.default, [4])))
    outcome = applied(Cleanup(), graph)
    assert (outcome.applied, outcome.declined) == ((), ())


def test_names_of_constants_are_new() -> None:
    def make(b: Builder) -> fx.Node:
        taken = b.constant("_folded_0", torch.ones(4))
        other = b.call(aten.exp.default, b.call(aten.full.default, [4], 1.0))
        return b.call(aten.mul.Tensor, b.call(aten.sub.Tensor, taken, taken), other)

    graph = plus(make)
    applied(Cleanup(), graph)
    assert torch.equal(graph.module._folded_0, torch.ones(4))
    assert torch.equal(graph.module._folded_1, torch.zeros(4))


def test_constant_is_shared_by_both_halves() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4, 4))
    tangent = b.input(Role.TANGENT, "0", (4, 4))
    mask = causal(b, 4)
    y = b.call(aten.mul.Tensor, w, mask)
    graph = b.build({output(): y, grad("w"): b.backward(aten.mul.Tensor, tangent, mask)})
    applied(Cleanup(), graph)
    assert targets(graph) == ["mul", "mul"]


def test_returned_literal_is_copied_at_each_call() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (2,))
    literal = b.call(aten.lift_fresh_copy.default, b.constant("literal", torch.tensor([1.0, 2.0])))
    outputs = {output("0"): b.call(aten.neg.default, x), output("1"): literal}
    graph = b.build(outputs, Level.INFERENCE)
    assert reasons(applied(Cleanup(), graph)) == [("lift_fresh_copy", "escapes")]
