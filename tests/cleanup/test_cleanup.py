"""Cleanup on small graphs: dead code, duplicates, and what it leaves alone and says so."""

from __future__ import annotations

import importlib.util
import math
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.errors import SpecError
from graphopt.graph import Graph, Level
from graphopt.passbase import PassContext
from graphopt.passes.cleanup import Cleanup
from graphopt.pipeline.spec import parse_spec
from graphopt.plan import Role
from tests.support.applying import applied, golden, reasons, targets
from tests.support.graphs import Builder, aten, grad, mutation, output
from tests.support.legal_graphs import branch, collective, cond

Pair = Callable[[Builder, fx.Node], tuple[fx.Node, fx.Node]]


def sum_of(make: Pair) -> Graph:
    """The sum of two values computed from one input, as an inference graph."""
    b = Builder()
    first, second = make(b, b.input(Role.INPUT, "0", (4, 4)))
    return b.build({output(): b.call(aten.add.Tensor, first, second)}, Level.INFERENCE)


def test_golden() -> None:
    golden(Cleanup())


# -- dead code -------------------------------------------------------------------------------------


def test_dead_chain_is_removed_and_counted() -> None:
    def make(b: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        b.call(aten.neg.default, b.call(aten.neg.default, b.call(aten.exp.default, x)))
        return x, x

    graph = sum_of(make)
    outcome = applied(Cleanup(), graph)
    assert targets(graph) == ["add"]
    numbers = {(a.site, a.what): a.numbers for a in outcome.applied}
    assert numbers == {
        ("aten.exp.default", "removed dead code"): {"nodes": 1},
        ("aten.neg.default", "removed dead code"): {"nodes": 2},
    }


def test_dead_random_operator_keeps_its_place_in_the_stream() -> None:
    def make(b: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        b.call(aten.rand.default, [3])
        return x, b.call(aten.rand.default, [4, 4])

    graph = sum_of(make)
    assert reasons(applied(Cleanup(), graph)) == [("rand", "random-op")]
    assert targets(graph) == ["rand", "rand", "add"]


def test_unread_results_of_a_read_operator_are_removed() -> None:
    def make(b: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        parts = b.call(aten.sort.default, x)
        b.call(operator.getitem, parts, 1)
        return x, b.call(operator.getitem, parts, 0)

    graph = sum_of(make)
    applied(Cleanup(), graph)
    assert [n.args[1] for n in graph.operators if n.target is operator.getitem] == [0]


def test_writes_checks_and_collectives_stay() -> None:
    b = Builder()
    buffer = b.input(Role.BUFFER, "b", (4,))
    x = b.input(Role.INPUT, "0", (4,))
    b.call(collective.wait_tensor.default, b.call(collective.all_reduce.default, x, "sum", "0"))
    b.call(aten._assert_async.default, b.call(aten.any.default, x))
    new = b.call(aten.add_.Tensor, buffer, x)
    b.call(aten.mul_.Tensor, b.call(aten.abs.default, x), 2)
    graph = b.build({mutation("b"): new, output(): b.call(aten.neg.default, x)}, Level.INFERENCE)
    before = targets(graph)
    outcome = Cleanup().apply(graph, PassContext())
    assert targets(graph) == before
    assert reasons(outcome) == [("wait_tensor", "opaque-op")]


def test_higher_order_operators_are_opaque() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", ())
    flag = b.call(aten.gt.Scalar, x, 0)
    yes, no = (
        b.subgraph("yes", branch(aten.sin.default)),
        b.subgraph("no", branch(aten.cos.default)),
    )
    both = [b.call(cond, flag, yes, no, (x,)) for _ in range(3)]
    parts = [b.call(operator.getitem, one, 0) for one in both[:2]]
    graph = b.build({output(): b.call(aten.add.Tensor, *parts)}, Level.INFERENCE)
    outcome = Cleanup().apply(graph, PassContext())
    assert outcome.applied == ()
    assert reasons(outcome) == [
        ("cond_1", "opaque-op"),
        ("cond_2", "opaque-op"),
        ("cond_2", "opaque-op"),
    ]


# -- duplicates ------------------------------------------------------------------------------------


def test_duplicates_are_merged_through_chains() -> None:
    def make(b: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        return tuple(b.call(aten.exp.default, b.call(aten.mul.Tensor, x, 2.0)) for _ in range(2))

    graph = sum_of(make)
    assert reasons(applied(Cleanup(), graph)) == []
    assert targets(graph) == ["mul", "exp", "add"]


def test_operators_with_several_results_are_merged() -> None:
    def make(b: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        return tuple(b.call(operator.getitem, b.call(aten.sort.default, x), 0) for _ in range(2))

    graph = sum_of(make)
    applied(Cleanup(), graph)
    assert targets(graph) == ["sort", "add"]


@pytest.mark.parametrize(
    ("one", "other", "left"),
    [
        (1, 1.0, 2),
        (1, True, 2),
        (0.0, -0.0, 2),
        (2.0, 3.0, 2),
        (2.0, 2.0, 1),
        (math.nan, math.nan, 1),
        (math.inf, math.inf, 1),
    ],
)
def test_numbers_are_equal_by_type_and_bits(one: float, other: float, left: int) -> None:
    graph = sum_of(lambda b, x: tuple(b.call(aten.add.Tensor, x, n) for n in (one, other)))
    applied(Cleanup(), graph)
    assert len(targets(graph)) == left + 1


def test_keyword_arguments_count() -> None:
    graph = sum_of(
        lambda b, x: tuple(b.call(aten.sum.default, x, dtype=d) for d in (None, torch.float64))
    )
    applied(Cleanup(), graph)
    assert targets(graph) == ["sum", "sum", "add"]


def test_random_duplicates_stay_different() -> None:
    graph = sum_of(lambda b, x: tuple(b.call(aten.rand_like.default, x) for _ in range(2)))
    assert reasons(applied(Cleanup(), graph)) == [("rand_like_1", "random-op")]
    assert targets(graph) == ["rand_like", "rand_like", "add"]


def test_uninitialised_memory_is_not_merged() -> None:
    graph = sum_of(lambda b, x: tuple(b.call(aten.empty_like.default, x) for _ in range(2)))
    assert reasons(Cleanup().apply(graph, PassContext())) == [("empty_like_1", "unknown-result")]


def test_two_outputs_never_become_one() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4, 4))
    first, second = (b.call(aten.exp.default, x) for _ in range(2))
    rows = b.call(aten.view.default, second, [16])
    graph = b.build({output("0"): first, output("1"): rows}, Level.INFERENCE)
    assert reasons(applied(Cleanup(), graph)) == [("exp_1", "escapes")]


def test_calls_that_were_captured_under_other_defaults_are_different() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,))
    first = b.call(aten.full.default, [4], 2.0)
    torch.set_default_dtype(torch.float64)
    try:
        second = b.call(aten.full.default, [4], 2.0)
    finally:
        torch.set_default_dtype(torch.float32)
    total = b.call(aten.add.Tensor, b.call(aten.add.Tensor, x, first), second)
    graph = b.build({output(): total}, Level.INFERENCE)
    assert Cleanup().apply(graph, PassContext()).applied == ()


def test_reads_around_a_write_are_different() -> None:
    b = Builder()
    buffer = b.input(Role.BUFFER, "b", (4,))
    before = b.call(aten.exp.default, buffer)
    new = b.call(aten.add_.Tensor, buffer, before)
    after = b.call(aten.exp.default, new)
    again = b.call(aten.exp.default, new)
    total = b.call(aten.add.Tensor, after, again)
    graph = b.build({mutation("b"): new, output(): total}, Level.INFERENCE)
    outcome = Cleanup().apply(graph, PassContext())
    assert reasons(outcome) == [("exp_2", "mutated")]
    assert outcome.applied == ()


# -- forward and backward --------------------------------------------------------------------------


def step(*, kept: bool, tag: CheckpointPolicy | None = None) -> Graph:
    """``y = sin(x w)``; backward computes ``x w`` again, and may read the forward's, too."""
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    x = b.input(Role.INPUT, "0", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    product = b.call(aten.mul.Tensor, x, w)
    product.meta["recompute"] = tag
    y = b.call(aten.sin.default, product)
    again = b.backward(aten.mul.Tensor, x, w)
    slope = b.backward(aten.cos.default, again)
    if kept:
        slope = b.backward(aten.mul.Tensor, slope, b.backward(aten.neg.default, product))
    return b.build({output(): y, grad("w"): b.backward(aten.mul.Tensor, tangent, slope)})


def test_backward_computes_again_what_is_not_kept() -> None:
    outcome = applied(Cleanup(), step(kept=False))
    assert reasons(outcome) == [("mul_1", "saves-activation")]
    assert outcome.declined[0].numbers == {"bytes": 16}


def test_backward_reads_what_is_kept_anyway() -> None:
    graph = step(kept=True)
    assert reasons(applied(Cleanup(), graph)) == []
    assert targets(graph) == ["mul", "sin", "cos", "neg", "mul", "mul"]


def test_checkpointed_values_are_computed_again() -> None:
    graph = step(kept=True, tag=CheckpointPolicy.MUST_RECOMPUTE)
    assert reasons(applied(Cleanup(), graph)) == [("mul_1", "recompute")]


def test_duplicates_in_one_checkpointed_region_are_merged() -> None:
    for regions, left in (((1, 1), 2), ((1, 2), 3)):
        graph = sum_of(lambda b, x: tuple(b.call(aten.exp.default, x) for _ in range(2)))
        for node, region in zip(graph.operators, regions, strict=False):
            node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=region)
        applied(Cleanup(), graph)
        assert len(targets(graph)) == left


def test_constants_are_made_again_in_backward_without_a_word() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    y = b.call(aten.mul.Tensor, w, b.call(aten.full.default, [4], 2.0))
    gradient = b.backward(aten.mul.Tensor, tangent, b.backward(aten.full.default, [4], 2.0))
    graph = b.build({output(): y, grad("w"): gradient})
    outcome = applied(Cleanup(), graph)
    assert (outcome.applied, outcome.declined) == ((), ())


def test_forward_never_reads_backward() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    early = b.backward(aten.exp.default, b.backward(aten.view.default, w, [2, 2]))
    gradient = b.backward(aten.mul.Tensor, tangent, b.backward(aten.view.default, early, [4]))
    late = b.call(aten.exp.default, b.call(aten.view.default, w, [2, 2]))
    again = b.backward(aten.mul.Tensor, gradient, b.backward(aten.sum.default, late))
    y = b.call(aten.neg.default, late)
    graph = b.build({output(): y, grad("w"): again})
    outcome = applied(Cleanup(), graph)
    assert (outcome.applied, outcome.declined) == ((), ())


# -- bad input -------------------------------------------------------------------------------------


def test_there_are_no_options() -> None:
    with pytest.raises(SpecError, match="cleanup") as error:
        parse_spec("cleanup{level=3}")
    assert "level" in str(error.value)


def test_passes_is_no_package_of_its_own() -> None:
    path = Path(importlib.util.find_spec("graphopt.passes").origin)
    spec = importlib.util.spec_from_file_location("passes", path)
    with pytest.raises(ImportError, match=r"^import graphopt\.passes, not passes$"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
