from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from torch import fx

from graphopt.errors import ArgumentError, SpecError
from graphopt.graph import Graph, value_of
from graphopt.passbase import (
    EXACT,
    REASSOCIATED,
    Applied,
    Numerics,
    Outcome,
    Pass,
    PassContext,
    lowered,
)
from graphopt.plan import Role, Signature, Slot
from graphopt.testing import check_pass, forward_graphs, inference_graphs, joint_graphs
from graphopt.testing.obligations import OBLIGATIONS

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _same_examples_every_time() -> Iterator[None]:
    before = settings.default
    settings.register_profile("fixed", derandomize=True, database=None)
    settings.load_profile("fixed")
    yield
    settings.register_profile("before", before)
    settings.load_profile("before")


@dataclass(frozen=True)
class Demo(Pass):
    """A pass that rewrites each node that `rewrite` takes."""

    name: ClassVar[str] = "demo"

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        applied = [Applied(n.name, "rewritten") for n in graph.nodes if self.rewrite(graph, n)]
        if applied:
            graph.changed()
        return Outcome(tuple(applied))

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        raise NotImplementedError


def replace(graph: Graph, node: fx.Node, by: fx.Node) -> bool:
    node.replace_all_uses_with(by)
    graph.fx.erase_node(node)
    return True


def insert_after(graph: Graph, node: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    """A new call of which `node` is an argument; its fake value is worked out."""
    with graph.fx.inserting_after(node):
        new = graph.fx.call_function(target, args)  # type: ignore[arg-type]
    new.meta["partitioner_tag"] = node.meta["partitioner_tag"]
    new.meta["val"] = target(*fx.map_arg(args, value_of))  # type: ignore[operator,arg-type]
    return new


# -- passes that are right -------------------------------------------------------------------------


@dataclass(frozen=True)
class DropDetach(Demo):
    """Removes views of a whole tensor."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target not in (aten.detach.default, aten.alias.default):
            return False
        return replace(graph, node, node.args[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class RoundProducts(Demo):
    """Rounds the results of matrix products, as hardware of less precision would."""

    name: ClassVar[str] = "round_products"
    bound: float = 0.05
    kind: str = "lowered"
    decimals: int = 4

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        return {"lowered": lowered(self.bound), "reassociated": REASSOCIATED, "exact": EXACT}[
            self.kind
        ]

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target not in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            return False
        if any(u.target is aten.round.decimals for u in node.users):
            return False
        if value_of(node).dtype is not torch.float32:
            return False
        users = list(node.users)
        with graph.fx.inserting_after(node):
            rounded = graph.fx.call_function(
                aten.round.decimals, (node,), {"decimals": self.decimals}
            )
        rounded.meta["val"] = value_of(node)
        rounded.meta["partitioner_tag"] = node.meta["partitioner_tag"]
        for user in users:
            user.replace_input_with(node, rounded)
        return True


@dataclass(frozen=True)
class CountSteps(Pass):
    """Adds a state that counts steps."""

    name: ClassVar[str] = "count_steps"
    changes_signature: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        slot = Slot(Role.STATE, "count_steps/count")
        if slot in graph.signature.inputs:
            return Outcome()
        ctx.state.setdefault("count", torch.zeros(3))
        fake = value_of(graph.inputs[0]).new_empty(3)
        with graph.fx.inserting_after(graph.inputs[-1]):
            count = graph.fx.placeholder("s_count")
        count.meta.update(val=fake, partitioner_tag="is_forward")
        graph.signature = Signature((*graph.signature.inputs, slot), graph.signature.outputs)
        new = insert_after(graph, count, aten.add.Tensor, (count, 1.0))
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        graph.set_outputs({Slot(Role.MUTATION, "count_steps/count"): new, **outputs})
        graph.changed()
        return Outcome((Applied("count", "added"),))


@pytest.mark.parametrize("pass_", [DropDetach(), RoundProducts(), CountSteps()], ids=repr)
def test_passes_that_are_right(pass_: Pass) -> None:
    check_pass(pass_, max_examples=40)


def test_the_graphs_to_try_can_be_given() -> None:
    seen = []

    @dataclass(frozen=True)
    class Look(Demo):
        def rewrite(self, graph: Graph, node: fx.Node) -> bool:
            seen.append(node.target)
            return False

    with pytest.raises(AssertionError, match="nothing was proved"):
        check_pass(Look(), graphs=inference_graphs(kinds=["softmax"]), max_examples=5)
    assert aten._softmax.default in seen
    assert not {aten.tanh.default, aten._softmax_backward_data.default} & set(seen)


# -- passes that are wrong -------------------------------------------------------------------------


@dataclass(frozen=True)
class ForgetFactor(Demo):
    """Uses the first factor in place of a product."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        product = node.target is aten.mul.Tensor
        if not product or value_of(node.args[0]).shape != value_of(node).shape:  # type: ignore[arg-type]
            return False
        return replace(graph, node, node.args[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class BreakDtype(Demo):
    """Leaves out casts."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is not aten._to_copy.default:
            return False
        return replace(graph, node, node.args[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class DelayDropout(Demo):
    """Lets the first of two independent dropouts run after the second."""

    idempotent: ClassVar[bool] = False

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        random = [n for n in graph.nodes if n.target is aten.native_dropout.default]
        if node.op != "output" or len(random) < 2 or random[0].args != random[1].args:
            return False
        random[1].append(random[0])
        for user in sorted(random[0].users, reverse=True):
            random[0].append(user)
        return True


@dataclass(frozen=True)
class ForgetOutput(Demo):
    """Returns one output less."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        if node.op != "output" or len(outputs) < 2:
            return False
        graph.set_outputs(dict(list(outputs.items())[:-1]))
        return True


@dataclass(frozen=True)
class ForgetCopy(Demo):
    """Removes copies, even of what is returned."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is not aten.clone.default:
            return False
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        same = value_of(node).stride() == value_of(operand).stride()
        return same and replace(graph, node, operand)


@dataclass(frozen=True)
class KeepCopying(Demo):
    """Puts a copy before every relu, each time."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is not aten.relu.default:
            return False
        copy = insert_after(graph, node, aten.clone.default, node.args)
        node.prepend(copy)
        node.args = (copy,)
        return True


@dataclass(frozen=True)
class BeSilent(DropDetach):
    """Says nothing about what it did."""

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        super().apply(graph, ctx)
        return Outcome()


@dataclass(frozen=True)
class ForgetToAnnounce(DropDetach):
    """Leaves cached analyses and compiled code as they were."""

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        done = [n.name for n in graph.nodes if self.rewrite(graph, n)]
        return Outcome(tuple(Applied(name, "rewritten") for name in done))


@dataclass(frozen=True)
class Rename(Demo):
    """Names placeholders anew."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.op != "placeholder" or node.name.startswith("new_"):
            return False
        node._rename(f"new_{node.name}")
        return True


_calls: list[int] = []


@dataclass(frozen=True)
class Drift(Demo):
    """Makes something else at every call."""

    idempotent: ClassVar[bool] = False

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.op != "output":
            return False
        _calls.append(1)
        insert_after(graph, graph.outputs[0], aten.add.Tensor, (graph.outputs[0], len(_calls)))
        return True


@dataclass(frozen=True)
class Crash(Demo):
    """Does not expect sums."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is aten.sum.default:
            raise KeyError("sum")
        return False


@pytest.mark.parametrize(
    ("pass_", "obligation", "detail", "kinds"),
    [
        (ForgetFactor(), "same-results", "of its largest magnitude; exact allows 0", "binary"),
        (BreakDtype(), "verifies", "dtype", "cast"),
        (DelayDropout(), "same-results", "exact allows 0", "dropout duplicate"),
        (ForgetOutput(), "keeps-signature", "`changes_signature` is not declared", "unary"),
        (ForgetCopy(), "no-new-aliases", "output '0' now shares memory with input '0'", "copies"),
        (KeepCopying(), "is-idempotent", "a second application changes the graph", "unary"),
        (BeSilent(), "reports", "lists nothing as applied", "copies unary"),
        (ForgetToAnnounce(), "reports", "without a call of `graph.changed()`", "copies unary"),
        (Rename(), "keeps-signature", "placeholders were renamed", "unary"),
        (Drift(), "is-deterministic", "a second run on the same graph", "unary"),
        (Crash(), "runs", "KeyError: 'sum'", "reduction"),
        (RoundProducts(kind="exact", decimals=2), "same-results", "exact allows 0", "linear"),
        (RoundProducts(1e-5, decimals=2), "same-results", "lowered(1e-05) allows", "linear"),
        (
            RoundProducts(kind="reassociated", decimals=2),
            "same-results",
            "reassociated allows",
            "linear",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else "",
)
def test_passes_that_are_wrong(pass_: Pass, obligation: str, detail: str, kinds: str) -> None:
    with pytest.raises(AssertionError) as failure:
        check_pass(pass_, graphs=joint_graphs(kinds=kinds.split()), max_examples=200)
    message = str(failure.value)
    assert message.startswith(f"pass {pass_.name!r} fails {obligation!r}: ")
    assert detail in message
    assert f"spec: {pass_.name}" in message
    graph = message.partition("graph before:\n")[2].partition("graph after:\n")[0]
    assert graph.startswith("gopt 1 joint")
    assert graph.count(" = ") <= 16, message


def test_every_obligation_has_a_pass_that_violates_it() -> None:
    cases = test_passes_that_are_wrong.pytestmark[0].args[1]  # type: ignore[attr-defined]
    apart = {"survives-printing", "same-gradients", "same-at-other-sizes"}
    assert set(OBLIGATIONS) - apart <= {case[1] for case in cases}


@dataclass(frozen=True)
class StopGradient(Demo):
    """Detaches what a ReLU gets: the same values, and no gradient."""

    levels: ClassVar[frozenset[str]] = frozenset({"forward"})

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.target is not aten.relu.default:
            return False
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.target is aten.detach.default:
            return False
        node.args = (insert_after(graph, source, aten.detach.default, (source,)),)
        return True


def test_a_backward_that_is_lost() -> None:
    graphs = forward_graphs(kinds=["unary", "linear"])
    with pytest.raises(AssertionError, match="fails 'same-gradients'") as failure:
        check_pass(StopGradient(), graphs=graphs, max_examples=100)
    assert "gopt 1 forward" in str(failure.value)


@dataclass(frozen=True)
class NameConstant(Demo):
    """Makes a constant that its text does not hold."""

    def rewrite(self, graph: Graph, node: fx.Node) -> bool:
        if node.op != "output" or hasattr(graph.module, "hidden"):
            return False
        graph.module.hidden = torch.nn.Parameter(torch.zeros(2, 300))
        with graph.fx.inserting_after(graph.inputs[-1]):
            constant = graph.fx.get_attr("hidden")
        constant.meta["val"] = value_of(graph.inputs[0]).new_empty(2, 300)
        constant.meta["partitioner_tag"] = "is_forward"
        return True


def test_a_result_that_does_not_survive_printing() -> None:
    with pytest.raises(AssertionError, match="fails 'survives-printing'"):
        check_pass(NameConstant(), max_examples=5)


# -- what is wrong without any graph ---------------------------------------------------------------


@dataclass(frozen=True)
class Unspeakable(DropDetach):
    """Has an option that the spec language cannot say."""

    table: dict[str, int] | None = None


@dataclass(frozen=True)
class Needy(DropDetach):
    """Requires what generated graphs do not have."""

    requires: ClassVar[frozenset[str]] = frozenset({"partitioned"})


@dataclass(frozen=True)
class OfAnotherLevel(DropDetach):
    """Works on a level that is not generated."""

    levels: ClassVar[frozenset[str]] = frozenset({"middle"})


def test_bad_passes_are_refused() -> None:
    with pytest.raises(SpecError, match="option 'table' of pass 'demo'"):
        check_pass(Unspeakable(table={"a": 1}))
    with pytest.raises(ArgumentError, match="pass 'demo' requires partitioned"):
        check_pass(Needy())
    with pytest.raises(ArgumentError, match="levels of pass 'demo' cannot be generated"):
        check_pass(OfAnotherLevel())


def test_a_pass_may_own_state():
    from tests.support.stateful_pass import GradientNorms

    class Once(GradientNorms):
        idempotent = False

    check_pass(Once(), max_examples=20)
