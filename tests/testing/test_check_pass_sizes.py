"""Passes that declare to take symbolic sizes: what `check_pass` finds wrong in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

from graphopt.analysis.hints import hint, hints
from graphopt.graph import Graph, value_of
from graphopt.passbase import REASSOCIATED, Declined, Numerics, Outcome, Pass, PassContext
from graphopt.plan import Role
from graphopt.rewrite import emit
from graphopt.testing import check_pass, joint_graphs
from tests.testing.test_check_pass import Demo, replace

aten = torch.ops.aten


@dataclass(frozen=True)
class CountExamples(Demo):
    """Puts the number of elements that the captured call had in the place of a mean's."""

    symbolic: ClassVar[bool] = True

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is not aten.mean.default:
            return False
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        count = math.prod(hints(value_of(source).shape) or ())
        with graph.fx.inserting_before(node):
            total = emit(graph, aten.sum.default, source, like=node)
            return replace(graph, node, emit(graph, aten.div.Scalar, total, count, like=node))

    numerics: ClassVar[Numerics] = REASSOCIATED


@dataclass(frozen=True)
class SameByChance(Demo):
    """Takes a size that is 3 in the captured call for the number."""

    symbolic: ClassVar[bool] = True

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is not aten.relu.default or not value_of(node).dim():
            return False
        size = value_of(node).shape[0]
        if not isinstance(size, torch.SymInt) or hint(size) != 3:
            return False
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        with graph.fx.inserting_before(node):
            cut = emit(graph, aten.slice.Tensor, source, 0, 0, 3, like=node)
        cut.meta["val"] = value_of(node)
        node.args = (cut,)
        return True

    idempotent: ClassVar[bool] = False


@dataclass(frozen=True)
class FixSizes(Demo):
    """Asks what a size is, and so makes it that."""

    symbolic: ClassVar[bool] = True

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is not aten.relu.default or not value_of(node).dim():
            return False
        int(value_of(node).shape[0])
        return False


@pytest.mark.parametrize(
    ("pass_", "obligation", "detail"),
    [
        (CountExamples(), "same-at-other-sizes", "in a call with the sizes 0.0 = "),
        (SameByChance(), "verifies", "shape"),
        (FixSizes(), "same-at-other-sizes", "holds for those of the captured call only"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else "",
)
def test_passes_that_take_a_size_for_that_of_all_calls(
    pass_: Pass, obligation: str, detail: str
) -> None:
    kinds = ["reduction"] if isinstance(pass_, CountExamples) else ["unary"]
    graphs = joint_graphs(kinds=kinds, max_steps=1, symbolic=True)
    with pytest.raises(AssertionError) as failure:
        check_pass(pass_, graphs=graphs, max_examples=40)
    message = str(failure.value)
    assert message.startswith(f"pass 'demo' fails {obligation!r}: ")
    assert detail in message
    assert isinstance(pass_, FixSizes) or "symbol s0 = 3 from " in message


def test_a_pass_that_takes_symbols_gets_them_by_default() -> None:
    seen = set()

    @dataclass(frozen=True)
    class Look(Pass):
        name: ClassVar[str] = "look"
        symbolic: ClassVar[bool] = True

        def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
            seen.add(any(slot.role is Role.SIZE for slot in graph.signature.inputs))
            return Outcome(declined=(Declined("graph", "nothing", "it only looks"),))

    check_pass(Look(), max_examples=5, symbolic_examples=5)
    assert seen == {True, False}


def test_a_pass_that_takes_none_gets_graphs_of_the_captured_sizes() -> None:
    seen = set()

    @dataclass(frozen=True)
    class Look(Pass):
        name: ClassVar[str] = "look"

        def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
            shapes = (value_of(n).shape for n in graph.inputs)
            seen.update(type(size) for shape in shapes for size in shape)
            return Outcome(declined=(Declined("graph", "nothing", "it only looks"),))

    graphs = joint_graphs(kinds=["copies", "unary"], symbolic=True)
    check_pass(Look(), graphs=graphs, max_examples=5)
    assert seen == {int}
