"""What operators do beside computing, for all of ATen; who owns which memory."""

from __future__ import annotations

import operator

import pytest
import torch

import graphopt.ops
from graphopt.analysis.aliasing import storage
from graphopt.analysis.effects import Effect, effect_of, is_repeatable, writes
from graphopt.analysis.sharing import Seen, Sharing
from graphopt.graph import Level
from graphopt.plan import Role
from tests.support.graphs import Builder, aten, grad, linear_graph, output
from tests.support.legal_graphs import collective

assert graphopt.ops  # registers torch.ops.graphopt


def every_operator() -> list[torch._ops.OpOverload]:
    found = []
    for schema in torch._C._jit_get_all_schemas():
        namespace, name = schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name, None) if namespace == "aten" else None
        if packet is not None and (schema.overload_name or "default") in packet.overloads():
            found.append(getattr(packet, schema.overload_name or "default"))
    return found


def effect(target: object) -> Effect:
    return effect_of(torch.fx.Graph().call_function(target))


def test_no_operator_that_draws_or_writes_is_pure() -> None:
    targets = every_operator()
    assert len(targets) > 2000
    for target in targets:
        schema = str(target._schema)
        if "Generator? " in schema or "!" in schema or schema.endswith("-> ()"):
            assert effect(target) is not Effect.PURE, schema


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.mm.default, Effect.PURE),
        (operator.getitem, Effect.PURE),
        (torch.ops.prims.mul.default, Effect.PURE),
        (torch.ops.graphopt.frozen.default, Effect.PURE),
        (aten.native_dropout.default, Effect.RANDOM),
        (aten.bernoulli.p, Effect.RANDOM),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, Effect.RANDOM),
        (aten.add_.Tensor, Effect.VISIBLE),
        (aten._assert_async.msg, Effect.VISIBLE),
        (aten._functional_assert_async.msg, Effect.VISIBLE),
        (aten.sym_constrain_range.default, Effect.VISIBLE),
        (collective.all_reduce.default, Effect.OPAQUE),
        (collective.wait_tensor.default, Effect.OPAQUE),
        (torch.ops.higher_order.cond, Effect.OPAQUE),
        (operator.setitem, Effect.OPAQUE),
    ],
)
def test_effects(target: object, expected: Effect) -> None:
    assert effect(target) is expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.exp.default, True),
        (aten.rand.default, False),
        (aten.empty_like.default, False),
        (aten.nonzero.default, False),
        (aten.add_.Tensor, False),
    ],
)
def test_repeatable(target: object, expected: bool) -> None:
    assert is_repeatable(torch.fx.Graph().call_function(target)) is expected


def test_pieces_of_a_view_lie_in_its_source_and_those_of_a_result_do_not() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,))
    halves = b.call(aten.split.Tensor, x, 2)
    half = b.call(operator.getitem, halves, 1)
    parts = b.call(aten.sort.default, x)
    values, again, indices = (b.call(operator.getitem, parts, i) for i in (0, 0, 1))
    graph = b.build({output(): half}, Level.INFERENCE)
    owner = storage(graph).owner
    assert owner[half] is x
    assert owner[values] is owner[again] is values
    assert owner[indices] is indices


def test_who_sees_what() -> None:
    graph = linear_graph()
    sharing = Sharing(graph)
    w, x, tangent, y, xt, gw = graph.nodes[:-1]
    assert sharing.seen(w) == Seen.GIVEN
    assert sharing.seen(x) == sharing.seen(xt) == Seen.GIVEN | Seen.KEPT
    assert sharing.seen(y) == sharing.seen(gw) == Seen.RETURNED
    assert sharing.obstacle(y, gw) == "escapes"
    assert sharing.obstacle(y, w) == "escapes"
    assert sharing.obstacle(gw, tangent) == "escapes"
    assert sharing.obstacle(x, w) == "snapshot"


def test_what_backward_returns_or_takes_out_of_a_tuple_is_kept() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    slope = b.call(aten.exp.default, w)
    parts = b.call(aten.sort.default, w)
    values, indices = (
        b.call(operator.getitem, parts, 0),
        b.backward(operator.getitem, parts, 1),
    )
    gradient = b.backward(aten.gather.default, tangent, 0, indices)
    graph = b.build({output(): values, grad("w"): slope, grad("v"): gradient})
    sharing = Sharing(graph)
    assert sharing.seen(slope) == Seen.RETURNED | Seen.KEPT
    assert sharing.seen(indices) == Seen.KEPT
    assert sharing.seen(values) == Seen.RETURNED


def test_merged_values_are_seen_by_the_readers_of_both() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    kept, inner = (b.call(aten.exp.default, w) for _ in range(2))
    y = b.call(aten.neg.default, inner)
    graph = b.build({output(): y, grad("w"): b.backward(aten.mul.Tensor, tangent, kept)})
    sharing = Sharing(graph)
    assert sharing.obstacle(inner, y) == ""
    sharing.merge(inner, kept)
    assert sharing.obstacle(inner, y) == "snapshot"
    assert not writes(kept)
