"""The runtime: halves, frozen values, backends, and the choice between them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import default_partition
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import BackendError
from graphopt.model.backend_choice import Built, choose
from graphopt.model.controller import controller_of
from graphopt.model.surface import report
from graphopt.model.trial import Trial
from graphopt.plan import Phase, Plan, Role
from graphopt.runtime.engine.halves import split
from graphopt.runtime.engine.training import TrainingEngine
from graphopt.runtime.frozen.prologue import hoist


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(h))).mean((2, 3)))


@pytest.fixture
def convs() -> Convs:
    torch.manual_seed(0)
    model = Convs()
    for _ in range(3):  # statistics that are not the initial ones
        model(torch.randn(8, 3, 8, 8) * 2 + 1)
    return model


X = torch.randn(4, 3, 8, 8)


def _engine(model: nn.Module) -> TrainingEngine:
    controller = controller_of(model)
    assert controller is not None
    engine = controller.variants[0].engine
    assert isinstance(engine, TrainingEngine)
    return engine


# -- halves ----------------------------------------------------------------------------------------


def test_backward_reads_parameters_late_and_saves_no_view_of_them(convs: Convs) -> None:
    graph = capture(convs, (X,)).graph
    halves = split(graph.module, graph.signature, default_partition)
    names = {graph.signature.inputs[i].name for kind, i in halves.sources if kind == "input"}
    assert {"conv2.weight", "head.weight"} <= names
    saved = halves.forward.graph.output_node().args[0][graph.signature.num_forward_outputs :]
    parameters = {n for n in halves.forward.graph.nodes if n.op == "placeholder"}
    assert not [n for n in saved if set(n.all_input_nodes) <= parameters and "t.default" in str(n)]


def test_saved_values_are_freed_when_the_graph_is_not_kept(convs: Convs) -> None:
    graphopt.optimize(convs, (X,), backend="eager")
    loss = convs(X).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_mutations_in_the_backward_half_reach_the_state() -> None:
    """What K-FAC needs: a pass adds a state input and updates it from backward values."""
    from tests.support.stateful_pass import GradientNorms

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    graphopt.optimize(model, passes=[GradientNorms()], backend="eager", verify="full")
    x = torch.randn(6, 3)
    for count in (1, 2):
        for m in (model, plain):
            m.zero_grad()
            m(x).square().sum().backward()
        state = graphopt.state_dict(model)
        for name, parameter in plain.named_parameters():
            expected = count * parameter.grad.square().sum()
            assert torch.allclose(state[f"gradient_norms/{name}"], expected), name
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )

    fresh = graphopt.optimize(copy.deepcopy(plain), passes=[GradientNorms()], backend="eager")
    graphopt.load_state_dict(fresh, state)
    fresh(x).square().sum().backward()
    model.zero_grad()
    model(x).square().sum().backward()
    resumed, straight = graphopt.state_dict(fresh), graphopt.state_dict(model)
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)
    with pytest.raises(graphopt.errors.StateError, match="shape"):
        graphopt.load_state_dict(fresh, {k: torch.ones(7) for k in straight})
    assert list(model.state_dict()) == list(plain.state_dict())


def test_plan_is_json_and_its_digest_follows_it(convs: Convs) -> None:
    plan = graphopt.optimize(convs, (X,), dry_run=True)
    assert isinstance(plan, Plan)
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["backend"] == "eager"
    other = Plan.from_json(plan.to_json().replace('"cleanup"', '"nothing"'))
    assert other.digest != plan.digest
    slots = plan.signature.outputs
    assert [s.phase for s in slots] == sorted((s.phase for s in slots), key=list(Phase).index)


# -- frozen values ---------------------------------------------------------------------------------


def _folded(model: nn.Module, backend: str = "eager") -> nn.Module:
    return graphopt.optimize(
        copy.deepcopy(model).eval(), passes="cleanup,fold_inference", backend=backend
    )


def _assert_follows(folded: nn.Module, plain: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(folded(X), plain(X), rtol=1e-4, atol=1e-5)


UPDATES = {
    "optimizer step": lambda m: m.conv1.weight.add_(0.5),
    "buffer": lambda m: m.bn1.running_mean.add_(1.0),
    "through data": lambda m: m.conv1.weight.data.mul_(0.5),
    "new data": lambda m: setattr(m.conv1.weight, "data", torch.randn_like(m.conv1.weight)),
    "new parameter": lambda m: setattr(
        m.conv1, "weight", nn.Parameter(torch.full_like(m.conv1.weight, 0.1))
    ),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_no_weight_update_is_missed(convs: Convs, update: Any) -> None:
    plain, folded = convs.eval(), _folded(convs)
    for _ in range(2):
        _assert_follows(folded, plain)
    torch.manual_seed(1)
    with torch.no_grad():
        update(plain)
    torch.manual_seed(1)
    with torch.no_grad():
        update(folded)
    _assert_follows(folded, plain)


def test_prologue_runs_once_while_nothing_changes(convs: Convs) -> None:
    folded = _folded(convs)
    with torch.no_grad():
        folded(X)
        controller = controller_of(folded)
        assert controller is not None
        keeper = controller.variants[0].engine._forward._run.chosen
        values = list(keeper.values)
        folded(X)
        assert all(a is b for a, b in zip(values, keeper.values, strict=True))
    assert not [n for n in hoist_of(folded).main.graph.nodes if "batch_norm" in str(n.target)], (
        "batch norm was not folded"
    )


def hoist_of(model: nn.Module) -> Any:
    with torch.no_grad():
        graph = capture(model, (X,), forward=type(model).forward).graph
    graphopt.Pipeline.parse("cleanup,fold_inference").run(graph)
    return hoist(graph.module)


# -- backends --------------------------------------------------------------------------------------


class Appending(nn.Module):
    """Its gradient by ``more``, which is empty, depends on no tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.more = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cat([self.scale, self.more])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradient_of_an_empty_parameter_is_empty(backend: str) -> None:
    model = graphopt.optimize(Appending(), backend=backend)
    model(torch.ones(2, 3)).sum().backward()
    assert model.scale.grad is not None
    assert model.scale.grad.tolist() == [2, 2, 2]
    assert model.more.grad is not None
    assert model.more.grad.shape == (0,)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.gelu(self.bn(self.body(x))), 0.4, self.training))


def test_inductor_trains_like_eager_with_the_same_random_stream() -> None:
    torch.manual_seed(0)
    model = Dropping()
    compiled = graphopt.optimize(copy.deepcopy(model), backend="inductor")
    x = torch.randn(8, 6)
    for seed in (1, 2):
        for m in (model, compiled):
            torch.manual_seed(seed)
            m.zero_grad()
            m(x).square().sum().backward()
        for (name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
        for a, b in zip(model.buffers(), compiled.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert report(compiled).specialisations[0].backend.backend == "inductor"


def test_inductor_inference_with_frozen_weights_follows_updates(convs: Convs) -> None:
    plain, folded = convs.eval(), _folded(convs, "inductor")
    _assert_follows(folded, plain)
    with torch.no_grad():
        for m in (plain, folded):
            m.conv2.weight.mul_(1.5)
    _assert_follows(folded, plain)


# -- the choice between them -----------------------------------------------------------------------


def _contest(convs: Convs, delays: dict[str, float]) -> Any:
    import time

    graph = capture(convs, (X,)).graph
    built = []

    def make(backend: str) -> Built:
        built.append(backend)
        if delays[backend] < 0:
            raise BackendError(f"no {backend} here")

        def call(model: nn.Module, x: Tensor) -> Tensor:
            time.sleep(delays[backend])
            return x * 2

        return Built(call, call)

    chosen = choose("auto", make, Trial(convs, (X,), {}), graph)
    return chosen.choice, built


def test_the_faster_backend_wins_and_the_verdict_is_kept(convs: Convs) -> None:
    choice, _ = _contest(convs, {"eager": 0.02, "inductor": 0.001})
    assert choice.backend == "inductor"
    assert "measured" in choice.reason
    assert choice.seconds["inductor"] < choice.seconds["eager"]
    choice, _ = _contest(convs, {"eager": 0.001, "inductor": 0.02})
    assert choice.backend == "inductor"
    assert "kept from an earlier run" in choice.reason


def test_eager_that_won_spares_the_compilation(convs: Convs) -> None:
    assert _contest(convs, {"eager": 0.001, "inductor": 0.02})[0].backend == "eager"
    choice, built = _contest(convs, {"eager": 0.001, "inductor": 0.02})
    assert choice.backend == "eager"
    assert built == ["eager"]


def test_missing_backend_leaves_eager_and_no_verdict(
    convs: Convs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice, _ = _contest(convs, {"eager": 0.001, "inductor": -1})
    assert choice.backend == "eager"
    assert "no inductor here" in choice.reason
    assert not list(tmp_path.rglob("*.json"))


def test_roles_of_a_joint_graph(convs: Convs) -> None:
    signature = capture(convs, (X,)).graph.signature
    assert set(signature.names(Role.GRAD)) == {n for n, _ in convs.named_parameters()}
    assert "bn1.running_mean" in signature.names(Role.MUTATION)
    assert signature.names(Role.INPUT) == ("x",)
