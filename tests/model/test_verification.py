"""What will run is compared with eager by default, and a difference is traced to who made it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphopt
from graphopt import registry
from graphopt.capture import joint
from graphopt.errors import GraphoptError, MismatchError
from graphopt.graph import Graph
from graphopt.model.comparison import Observed, compare
from graphopt.model.surface import report
from graphopt.model.trial import Trial
from graphopt.model.verification import Check
from graphopt.passbase import (
    ALGORITHM,
    EXACT,
    Applied,
    Numerics,
    Outcome,
    Pass,
    PassContext,
    lowered,
)
from graphopt.plan import Plan, Role
from graphopt.rewrite import emit
from graphopt.runtime.backends.eager import Eager
from graphopt.runtime.session import Session

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.bn(self.a(x)))) * 0.5


def _first(graph: Graph, target: object) -> fx.Node:
    return next(node for node in graph.operators if node.target is target)


def _output(graph: Graph, role: Role, name: str) -> int:
    return graph.signature.output_index(role, name)


def _constant(graph: Graph, outputs: list[fx.Node]) -> None:
    node = next(n for n in graph.operators if n.target is aten.mul.Tensor and n.args[1] == 0.5)
    node.args = (node.args[0], 0.505)


def _dropped_mutation(graph: Graph, outputs: list[fx.Node]) -> None:
    place = _output(graph, Role.MUTATION, "bn.running_mean")
    outputs[place] = graph.input(Role.BUFFER, "bn.running_mean")


def _swapped_gradients(graph: Graph, outputs: list[fx.Node]) -> None:
    i, j = (_output(graph, Role.GRAD, f"{name}.weight") for name in "ab")
    outputs[i], outputs[j] = outputs[j], outputs[i]


def _zero_gradient(graph: Graph, outputs: list[fx.Node]) -> None:
    place = _output(graph, Role.GRAD, "b.bias")
    with graph.fx.inserting_before(graph.output):
        outputs[place] = emit(graph, aten.mul.Tensor, outputs[place], 0.0, like=outputs[place])


def _no_relu_in_backward(graph: Graph, outputs: list[fx.Node]) -> None:
    node = _first(graph, aten.threshold_backward.default)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.fx.erase_node(node)


def _wrong_shape(graph: Graph, outputs: list[fx.Node]) -> None:
    node = _first(graph, aten.relu.default)
    node.meta["val"] = node.meta["val"].t()


def _wrong_for_large_values(graph: Graph, outputs: list[fx.Node]) -> None:
    node = _first(graph, aten.relu.default)
    node.target, node.args = aten.clamp.default, (node.args[0], 0, 50.0)


def _last_digit(graph: Graph, outputs: list[fx.Node]) -> None:
    place = _output(graph, Role.GRAD, "b.weight")
    with graph.fx.inserting_before(graph.output):
        outputs[place] = emit(graph, aten.mul.Tensor, outputs[place], 1 + 1e-7, like=outputs[place])


FAULTS: dict[str, Callable[[Graph, list[fx.Node]], None]] = {
    f.__name__.strip("_"): f
    for f in (
        *(_constant, _dropped_mutation, _swapped_gradients, _zero_gradient),
        *(_no_relu_in_backward, _wrong_shape, _wrong_for_large_values, _last_digit),
    )
}


@dataclass(frozen=True)
class Broken(Pass):
    """Makes one fault of a kind and promises what it does not keep."""

    name: ClassVar[str] = "broken"

    fault: str = "constant"
    numerics_: str = "exact"

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        kinds = {"exact": EXACT, "lowered": lowered(1e-3), "algorithm": ALGORITHM}
        return kinds[self.numerics_]

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        outputs = list(graph.outputs)
        FAULTS[self.fault](graph, outputs)
        graph.output.args = (outputs,)
        return Outcome((Applied("x", "broke"),))


def _run(passes: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = graphopt.optimize(Net(), passes=passes, **{"backend": "eager", **options})
    model(torch.randn(8, 16)).sum().backward()
    return model


@pytest.mark.parametrize("fault", FAULTS)
def test_the_default_catches_a_pass_that_is_not_exact(fault: str) -> None:
    with pytest.raises(GraphoptError, match="pass 'broken' promises exact"):
        _run([Broken(fault)])


def test_the_guilty_pass_is_named_among_others() -> None:
    from graphopt.passes.cleanup import Cleanup

    with pytest.raises(MismatchError, match="pass 'broken'"):
        _run([Cleanup(), Broken("zero_gradient")])


def test_a_pass_may_be_off_by_what_it_promises() -> None:
    model = _run([Broken("last_digit", "lowered")])
    found = report(model).specialisations[0].verification
    assert found.result == "within tolerance"
    assert 0 < found.worst_error < 1e-6
    with pytest.raises(MismatchError, match="promises lowered"):
        _run([Broken("constant", "lowered")])


def test_a_pass_that_changes_the_method_is_reported_and_the_others_are_held() -> None:
    model = _run([Broken("constant", "algorithm")])
    assert report(model).specialisations[0].verification.declined == ("broken",)
    assert "changes the training method by design" in model.explain()

    class After(Broken):
        name = "after"

    with pytest.raises(MismatchError, match="pass 'after'"):
        _run([Broken("constant", "algorithm"), After("zero_gradient")])


class Wrong(Eager):
    name = "wrong"

    def build(self, module: fx.GraphModule, plan: Plan, session: Session) -> Callable[..., Any]:
        copy = fx.GraphModule(module, fx.Graph())
        copy.graph.output(copy.graph.graph_copy(module.graph, {}))
        for node in copy.graph.find_nodes(op="call_function", target=aten.relu.default):
            node.target = aten.neg.default
        copy.recompile()
        return super().build(copy, plan, session)


def test_a_backend_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    get, names = registry.get, registry.names
    mine = {"wrong": Wrong}
    monkeypatch.setattr(registry, "get", lambda n, t=registry.PASSES: mine.get(n) or get(n, t))
    monkeypatch.setattr(registry, "names", lambda t=registry.PASSES: (*names(t), "wrong"))
    with pytest.raises(MismatchError, match="backend 'wrong' computes something else"):
        _run("cleanup", backend="wrong")


def test_a_gradient_that_is_nothing_but_rounding_is_no_mismatch() -> None:
    """A bias in front of a batch norm has no effect: its gradient is noise in any order of sums."""
    model = _run("cleanup", backend="inductor")
    entry = report(model).specialisations[0]
    assert entry.backend.backend == "inductor"
    assert entry.verification.result in ("bit-equal", "within tolerance")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(4, 8, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        out: Tensor = self.o(self.drop((weights @ v).transpose(1, 2).reshape(4, 8, 16)))
        return out


def _normed() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 4))
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("make", "shape"), [(_normed, (64, 16)), (Attention, (4, 8, 16))], ids=["norm", "attention"]
)
def test_rounding_of_bfloat16_is_no_mismatch(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bias of a key, or in front of a batch norm, has gradients that are nothing but rounding."""
    # So the graph rounds in another way than eager.
    monkeypatch.setattr(joint, "round_as_in_eager", lambda _: None)
    torch.manual_seed(seed)
    model = graphopt.optimize(make(), backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(shape))
    found = report(model).specialisations[0].verification
    assert found.result == "within tolerance"
    assert found.worst_error > 0.1


@pytest.mark.parametrize("fault", ["swapped_gradients", "zero_gradient", "no_relu_in_backward"])
@pytest.mark.parametrize("promise", ["exact", "lowered"])
def test_a_real_fault_is_caught_in_bfloat16(fault: str, promise: str) -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(MismatchError, match=f"pass 'broken' promises {promise}"),
    ):
        _run([Broken(fault, promise)])


class DrawsInPython(nn.Linear):
    """Draws where it cannot be seen by reading the code of forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * DRAW[0]()


DRAW: list[Callable[[], Any]] = [random.random]


def _observed(draw: Callable[[], Any]) -> Observed:
    DRAW[0] = draw
    return Trial(DrawsInPython(4, 4), (torch.ones(2, 4),), {}).observe(DrawsInPython.forward)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (random.random, "draws from Python's random"),
        (np.random.rand, "draws from numpy.random"),
        (lambda: torch.manual_seed(7) and 1.0, "sets a random seed"),
        (lambda: torch.rand(()), "differs from eager: output 0"),
    ],
)
def test_a_mismatch_names_its_cause(draw: Callable[[], Any], words: str) -> None:
    check = Check("eager", "here", None, None, None, ())  # type: ignore[arg-type]
    reference, other = _observed(draw), _observed(lambda: 2.0)
    worst = compare(reference, other)
    assert words in str(check._of_capture(reference, other, worst))


def test_verification_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graphopt.optimize(model, backend="eager")
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(state, torch.get_rng_state())
    expected = Net()
    expected.load_state_dict(before)
    expected(x)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fault", ["wrong_for_large_values", "wrong_shape"])
def test_an_exact_pass_is_held_beside_one_that_changes_the_method(fault: str) -> None:
    with pytest.raises(MismatchError, match="pass 'broken'"):
        _run([Broken(fault), *_kfac()])


def _kfac() -> list[Pass]:
    return list(graphopt.Pipeline.parse("kfac{interval=1}").passes)


class WithTarget(nn.Module):
    """Values that operators refuse when they are large: a target, an index, a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(4, 4), nn.Embedding(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = self.table((y * 15).long())
        kept = torch.bernoulli(y).unsqueeze(-1)
        return F.binary_cross_entropy(torch.sigmoid(self.fc(x) * kept + rows).mean(-1), y)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_values_that_operators_refuse_are_no_mismatch(backend: str) -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(WithTarget(), backend=backend)
    model(torch.randn(8, 4), torch.rand(8)).backward()
    assert report(model).specialisations[0].verification.result != "not run"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.b1, self.b2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b2(self.c2(F.relu(self.b1(self.c1(x))))))


def _several_outputs(h: Tensor) -> tuple[Tensor, ...]:
    normed = F.layer_norm(h, h.shape[1:])
    return normed.mean(), h.softmax(-1).sum(-1) - 1, h > 0, (h * 127).round().to(torch.int8), normed


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return _several_outputs(self.fc(x))


@pytest.mark.slow
def test_generated_code_rounds_in_its_own_way() -> None:
    """Biases in front of norms, outputs that cancel, and what is rounded to integers."""
    torch.manual_seed(0)
    residual = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), *(Block(16) for _ in range(2)), nn.Flatten()
    )
    for model, x in ((residual, torch.randn(8, 3, 12, 12)), (Outputs(), torch.randn(8, 8))):
        graphopt.optimize(model, backend="inductor")(x)
        entry = report(model).specialisations[0]
        assert entry.backend.backend == "inductor"
        assert entry.verification.result in ("bit-equal", "within tolerance")
