"""Which views and copies change nothing, and which only seem so."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.graph import Graph, Level
from graphopt.passbase import PassContext
from graphopt.passes.cleanup import Cleanup
from graphopt.plan import Role
from tests.support.applying import applied, reasons, targets
from tests.support.graphs import Builder, aten, grad, mutation, output

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Make = Callable[[Builder, fx.Node], fx.Node]


def between(make: Make, dtype: torch.dtype = f32) -> Graph:
    """``neg(make(neg(x)))`` for a 4 by 4 input, as an inference graph."""
    b = Builder()
    x = b.call(aten.neg.default, b.input(Role.INPUT, "0", (4, 4), dtype))
    y = b.call(aten.neg.default, make(b, x))
    return b.build({output(): y}, Level.INFERENCE)


def chain(*steps: tuple[object, ...]) -> Make:
    def make(b: Builder, x: fx.Node) -> fx.Node:
        for target, *args in steps:
            kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
            x = b.call(target, x, *args, **kwargs)
        return x

    return make


NOTHING = {
    "view to the same shape": chain((aten.view.default, [4, 4])),
    "view there and back": chain((aten.view.default, [16]), (aten.view.default, [4, 4])),
    "unsafe view": chain((aten._unsafe_view.default, [4, 4])),
    "expand to the same shape": chain((aten.expand.default, [4, 4])),
    "unsqueeze and squeeze": chain((aten.unsqueeze.default, 1), (aten.squeeze.dim, 1)),
    "two transposes": chain((aten.t.default,), (aten.t.default,)),
    "transpose and permute": chain((aten.transpose.int, 0, 1), (aten.permute.default, [1, 0])),
    "transpose of a dimension with itself": chain((aten.transpose.int, 1, 1)),
    "identical permutation": chain((aten.permute.default, [0, 1])),
    "the whole slice": chain((aten.slice.Tensor, 0, 0, 9223372036854775807)),
    "two halves of a detour": chain(
        (aten.unsqueeze.default, 0), (aten.permute.default, [1, 0, 2]), (aten.squeeze.dim, 1)
    ),
    "detach": chain((aten.detach.default,)),
    "alias": chain((aten.alias.default,)),
    "clone": chain((aten.clone.default,)),
    "clone into its own layout": chain(
        (aten.clone.default, {"memory_format": torch.contiguous_format})
    ),
    "cast to the same type": chain((aten._to_copy.default, {"dtype": f32})),
    "cast to more bits and back": chain(
        (aten._to_copy.default, {"dtype": f64}), (aten._to_copy.default, {"dtype": f32})
    ),
    "times one": chain((aten.mul.Tensor, 1.0)),
    "times a whole one": chain((aten.mul.Scalar, 1)),
    "by one": chain((aten.div.Tensor, 1)),
    "copy over something": lambda b, x: b.call(
        aten.copy.default, b.call(aten.zeros.default, [4, 4]), x
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_goes(name: str) -> None:
    graph = between(NOTHING[name])
    outcome = applied(Cleanup(), graph)
    assert targets(graph) == ["neg", "neg"]
    assert outcome.declined == ()


SOMETHING = {
    "another shape": (chain((aten.view.default, [16])), f32),
    "one transpose": (chain((aten.t.default,)), f32),
    "a part": (chain((aten.slice.Tensor, 0, 0, 3)), f32),
    "a later part": (chain((aten.slice.Tensor, 0, 1, 4)), f32),
    "every other row": (chain((aten.slice.Tensor, 0, 0, 4, 2)), f32),
    "a repetition": (chain((aten.expand.default, [2, 4, 4])), f32),
    "clone of a transpose into rows": (
        chain((aten.t.default,), (aten.clone.default, {"memory_format": torch.contiguous_format})),
        f32,
    ),
    "clone from an offset": (chain((aten.slice.Tensor, 0, 1, 4), (aten.clone.default,)), f32),
    "cast to less bits and back": (
        chain((aten._to_copy.default, {"dtype": bf16}), (aten._to_copy.default, {"dtype": f32})),
        f32,
    ),
    "cast between half types": (
        chain((aten._to_copy.default, {"dtype": f16}), (aten._to_copy.default, {"dtype": bf16})),
        bf16,
    ),
    "cast through whole numbers": (
        chain(
            (aten._to_copy.default, {"dtype": torch.int64}), (aten._to_copy.default, {"dtype": f32})
        ),
        f32,
    ),
    "plus zero, for minus zero": (chain((aten.add.Tensor, 0.0)), f32),
    "by one, which makes floats": (chain((aten.div.Tensor, 1)), torch.int64),
    "times two": (chain((aten.mul.Tensor, 2.0)), f32),
    "strides given as such": (chain((aten.as_strided.default, [4, 4], [4, 1])), f32),
}


@pytest.mark.parametrize("name", SOMETHING)
def test_what_changes_something_stays(name: str) -> None:
    make, dtype = SOMETHING[name]
    graph = between(make, dtype)
    outcome = applied(Cleanup(), graph)
    assert (outcome.applied, outcome.declined) == ((), ())


def test_equal_views_of_one_tensor_become_one() -> None:
    def make(b: Builder, x: fx.Node) -> fx.Node:
        halves = b.call(aten.split.Tensor, x, 2)
        upper = b.call(operator.getitem, halves, 0)
        left, right = (b.call(t, upper, *a) for t, *a in VIEWS)
        return b.call(aten.add.Tensor, left, right)

    VIEWS = ((aten.t.default,), (aten.permute.default, [1, 0]))
    graph = between(make)
    applied(Cleanup(), graph)
    assert targets(graph) == ["neg", "split", "t", "add", "neg"]


def test_literal_is_read_without_a_copy_even_in_backward() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (2,))
    tangent = b.input(Role.TANGENT, "0", (2,))
    literal = b.call(aten.lift_fresh_copy.default, b.constant("literal", torch.tensor([1.0, 2.0])))
    y = b.call(aten.mul.Tensor, w, literal)
    graph = b.build({output(): y, grad("w"): b.backward(aten.mul.Tensor, tangent, literal)})
    applied(Cleanup(), graph)
    assert targets(graph) == ["mul", "mul"]


# -- copies that somebody can tell from their source -----------------------------------------------


def clone_of(role: Role | None, *, returned: str, via: object = aten.clone.default) -> Graph:
    """A clone of an input, or of ``exp(x)``, that is returned; ``returned`` may add its source."""
    b = Builder()
    source = b.input(role or Role.INPUT, "0", (4,))
    if role is None:
        source = b.call(aten.exp.default, source)
    copy = b.call(aten.view.default, b.call(via, source), [2, 2])
    outputs = {output("0"): copy}
    if returned == "both":
        outputs[output("1")] = b.call(aten.view.default, source, [4, 1])
    return b.build(outputs, Level.INFERENCE)


def test_returned_copy_of_an_intermediate_goes() -> None:
    graph = clone_of(None, returned="copy")
    applied(Cleanup(), graph)
    assert targets(graph) == ["exp", "view"]


@pytest.mark.parametrize(
    ("role", "returned"), [(Role.INPUT, "copy"), (Role.PARAM, "copy"), (None, "both")]
)
def test_returned_copy_stays_separate(role: Role | None, returned: str) -> None:
    graph = clone_of(role, returned=returned)
    assert reasons(applied(Cleanup(), graph)) == [("clone", "escapes")]


def test_what_one_copy_shows_is_remembered_for_the_next() -> None:
    b = Builder()
    y = b.call(aten.exp.default, b.input(Role.INPUT, "0", (4,)))
    copies = [b.call(aten.clone.default, y) for _ in range(2)]
    views = [b.call(aten.view.default, copy, [2, 2]) for copy in copies]
    graph = b.build({output("0"): views[0], output("1"): views[1]}, Level.INFERENCE)
    assert reasons(applied(Cleanup(), graph)) == [("clone_1", "escapes")]


@pytest.mark.parametrize("returned", [True, False])
def test_no_node_is_returned_twice(returned: bool) -> None:
    b = Builder()
    y = b.call(aten.exp.default, b.input(Role.INPUT, "0", (4,)))
    first = y if returned else b.call(aten.detach.default, y)
    second = b.call(aten.detach.default, y)
    graph = b.build({output("0"): first, output("1"): second}, Level.INFERENCE)
    assert reasons(applied(Cleanup(), graph)) == [(second.name, "escapes")]


def test_copy_of_a_lazy_conjugate_stays() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,), torch.complex64)
    copy = b.call(aten.clone.default, b.call(aten._conj.default, x))
    parts = b.call(aten.view_as_real.default, copy)  # refuses what is lazy
    graph = b.build({output(): b.call(aten.neg.default, parts)}, Level.INFERENCE)
    assert applied(Cleanup(), graph).applied == ()


@pytest.mark.parametrize("turned", [True, False])
def test_buffers_that_swap_are_copied_first(turned: bool) -> None:
    b = Builder()
    buffers = [b.input(Role.BUFFER, name, (4, 4)) for name in "ab"]
    copies = [b.call(aten.clone.default, buffer) for buffer in buffers]
    if turned:
        copies = [b.call(aten.t.default, copy) for copy in copies]
    graph = b.build({mutation("a"): copies[1], mutation("b"): copies[0]}, Level.INFERENCE)
    assert reasons(applied(Cleanup(), graph)) == [("clone", "escapes"), ("clone_1", "escapes")]


def test_buffer_takes_a_computed_value_without_a_copy() -> None:
    b = Builder()
    buffer = b.input(Role.BUFFER, "b", (4,))
    x = b.input(Role.INPUT, "0", (4,))
    y = b.call(aten.exp.default, x)
    graph = b.build({mutation("b"): b.call(aten.copy.default, buffer, y)}, Level.INFERENCE)
    applied(Cleanup(), graph)
    assert targets(graph) == ["exp"]


def test_directly_returned_view_of_an_input_stays_a_node() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,))
    graph = b.build({output(): b.call(aten.detach.default, x)}, Level.INFERENCE)
    assert reasons(applied(Cleanup(), graph)) == [("detach", "escapes")]


def saved_copy(source: str) -> Graph:
    """Backward reads a forward copy of an input, of an output, of a slice or of a checkpoint."""
    b = Builder()
    x = b.input(Role.INPUT, "0", (4, 4))
    tangent = b.input(Role.TANGENT, "0", (2, 4))
    value = b.call(aten.exp.default, x)
    part = b.call(aten.slice.Tensor, x if source == "input" else value, 0, 0, 2)
    if source == "checkpoint":
        part = b.call(aten.sin.default, part)
        part.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    copy = b.call(aten.clone.default, part)
    y = b.call(aten.sin.default, copy)
    outputs = {output("0"): y, grad("0"): b.backward(aten.mul.Tensor, tangent, copy)}
    if source == "output":
        outputs = {output("0"): y, output("1"): value, grad("0"): outputs[grad("0")]}
    return b.build(outputs)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("input", "snapshot"),
        ("output", "snapshot"),
        ("slice", "saves-activation"),
        ("checkpoint", "recompute"),
    ],
)
def test_copy_that_is_kept_for_backward_stays(source: str, reason: str) -> None:
    graph = saved_copy(source)
    outcome = Cleanup().apply(graph, PassContext())
    assert reasons(outcome) == [("clone", reason)]
    assert "clone" in targets(graph)


def test_copy_before_a_write_stays() -> None:
    b = Builder()
    buffer = b.input(Role.BUFFER, "b", (4,))
    copy = b.call(aten.clone.default, buffer)
    new = b.call(aten.add_.Tensor, buffer, 1)
    total = b.call(aten.neg.default, copy)
    graph = b.build({mutation("b"): new, output(): total}, Level.INFERENCE)
    assert reasons(Cleanup().apply(graph, PassContext())) == [("clone", "mutated")]


def test_gradient_is_no_copy_of_its_tangent() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    y = b.call(aten.neg.default, w)
    graph = b.build({output(): y, grad("w"): b.backward(aten.clone.default, tangent)})
    assert reasons(applied(Cleanup(), graph)) == [("clone", "escapes")]
