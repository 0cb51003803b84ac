"""`optimize` is a drop-in: the same object, keys, parameters, hooks, optimizers and habits."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.plan import Plan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Logits of a batch of images."""
        return self.head(self.drop(F.relu(self.bn(self.conv(x))).mean((2, 3)))) * scale


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1])


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


def test_it_is_the_same_object(net: Net) -> None:
    parameters, keys = list(net.parameters()), list(net.state_dict())
    optimized = graphopt.optimize(net, backend="eager")
    assert optimized is net
    assert isinstance(optimized, Net)
    assert type(optimized).__name__ == "Net"
    assert all(a is b for a, b in zip(parameters, optimized.parameters(), strict=True))
    assert list(optimized.state_dict()) == keys
    assert inspect.signature(optimized.forward) == inspect.signature(Net().forward)
    assert optimized.forward.__doc__ == Net.forward.__doc__
    assert repr(optimized) == repr(Net())


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_bit_equal(net: Net, optimizer_first: bool, kind: type) -> None:
    plain = copy.deepcopy(net)
    if optimizer_first:
        optimizer = kind(net.parameters(), lr=0.1)
        graphopt.optimize(net, backend="eager")
    else:
        graphopt.optimize(net, backend="eager")
        optimizer = kind(net.parameters(), lr=0.1)
    assert _train(net, optimizer) == _train(plain, kind(plain.parameters(), lr=0.1))
    assert _same_state(net, plain)


def test_example_inputs_capture_now(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    graphopt.optimize(net, (X,), backend="eager")
    assert "joint graph" in net.explain()
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "capturing changed the model"
    assert net.conv.weight.grad is None


def test_capture_does_not_disturb_the_random_stream(net: Net) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    graphopt.optimize(net, (X,), backend="eager")
    assert torch.equal(torch.rand(3), expected)


def test_gradient_accumulation(net: Net) -> None:
    plain = copy.deepcopy(net)
    graphopt.optimize(net, backend="eager")
    for model in (net, plain):
        torch.manual_seed(3)
        for part in X.split(3):
            model(part).square().sum().backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(net: Net, to_none: bool) -> None:
    plain = copy.deepcopy(net)
    graphopt.optimize(net, backend="eager")
    for model in (net, plain):
        for seed in range(2):
            torch.manual_seed(seed)
            model.zero_grad(set_to_none=to_none)
            model(X).sum().backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_hooks_on_the_model_and_on_parameters(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append("pre"))
    net.register_forward_hook(lambda *_: seen.append("post"))
    net.register_full_backward_hook(lambda *_: seen.append("backward"))
    net.conv.weight.register_hook(lambda _: seen.append("gradient"))
    net.head.bias.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    net(X).sum().backward()
    assert sorted(seen) == ["accumulated", "backward", "gradient", "post", "pre"]


def test_forward_hook_added_to_a_submodule_later_is_not_lost(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    net.eval()
    before = net(X)
    handle = net.head.register_forward_hook(lambda _m, _i, out: out + 1)
    assert torch.equal(net(X), before + 1)
    handle.remove()
    assert torch.equal(net(X), before)


def test_to_another_dtype(net: Net) -> None:
    plain = copy.deepcopy(net)
    graphopt.optimize(net, backend="eager")
    net(X)
    plain(X)
    net.eval().double()
    plain.eval().double()
    assert torch.equal(net(X.double()), plain(X.double()))


def test_replaced_parameter_is_used(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    net.eval()
    net(X)
    net.head.weight = nn.Parameter(torch.zeros_like(net.head.weight))
    net.head.bias = nn.Parameter(torch.ones_like(net.head.bias))
    assert torch.equal(net(X), torch.ones(5, 3))


def test_deepcopy_is_optimized_and_independent(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    net(X)
    twin = copy.deepcopy(net)
    assert type(twin) is type(net)
    assert twin.conv.weight is not net.conv.weight
    twin(X).sum().backward()
    assert net.conv.weight.grad is None
    assert "joint graph" in twin.explain()


def test_state_dict_round_trip_with_a_plain_model(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    net(X)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    plain = Net()
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(plain.eval()(X), net.eval()(X))


def test_saving_the_whole_model_saves_the_plain_model(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    net(X)
    loaded = pickle.loads(pickle.dumps(net))
    assert type(loaded) is Net
    assert _same_state(loaded, net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is Net


def test_optimizing_twice_starts_again(net: Net) -> None:
    graphopt.optimize(net, (X,), backend="eager")
    graphopt.optimize(net, passes="", backend="eager")
    assert type(net) is Net
    assert "specialisation" not in net.explain()
    assert net(X).shape == (5, 3)


def test_dry_run_returns_a_plan_and_leaves_the_model_alone(net: Net) -> None:
    plan = graphopt.optimize(net, (X,), dry_run=True, mesh="dp=27600")
    assert isinstance(plan, Plan)
    assert type(net) is Net
    assert "head.weight" in plan.signature.names(graphopt.Role.GRAD)
    assert Plan.from_json(plan.to_json()) == plan


def test_keyword_arguments_and_python_values_specialise(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    net.eval()
    one = net(X)
    assert torch.equal(net(X, scale=2.0), one * 2)
    assert torch.equal(net(X), one)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Answer:
    logits: Tensor
    extra: dict[str, Tensor]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, (b, a)],
        lambda a, b: {"a": a, "b": {"c": b}},
        lambda a, b: OrderedDict(a=a, b=b),
        Pair,
        lambda a, b: Answer(a, {"b": b}),
        lambda a, b: (a, None, 3, "text", b),
    ],
)
def test_output_structures(wrap: object) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> object:
            h = self.lin(x)
            return wrap(h.tanh(), h.chunk(2, -1)[1])  # type: ignore[operator]

    model = Model()
    expected = model(torch.ones(2, 4))
    actual = graphopt.optimize(model, backend="eager")(torch.ones(2, 4))
    assert type(actual) is type(expected)
    from graphopt.model.tensors import tensors_of

    a, b = dict(tensors_of(expected)), dict(tensors_of(actual))
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_outputs_that_are_inputs_or_views_of_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.lin(x)
            return h, x, x[1:], h.view(2, 2, 2), self.lin.weight.t()

    model = graphopt.optimize(Model(), backend="eager")
    x = torch.randn(2, 4)
    h, same, part, view, weight = model(x)
    assert same is x
    assert part.data_ptr() == x[1:].data_ptr()
    assert torch.equal(view.flatten(), h.flatten())
    weight.sum().backward()
    assert torch.equal(model.lin.weight.grad, torch.ones(4, 4))


def test_outputs_may_be_changed_in_place_by_the_caller(net: Net) -> None:
    graphopt.optimize(net, backend="eager")
    out = net(X)
    out.mul_(2)
    out.sum().backward()
    assert net.head.weight.grad is not None


def test_python_side_effects_of_forward_happen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            h = self.lin(x)
            self.last = h.detach()
            return h

    model = graphopt.optimize(Model(), backend="eager")
    for _ in range(2):
        out = model(torch.randn(2, 4))
        assert torch.equal(model.last, out)


def test_weights_for_backward_can_differ_from_forward() -> None:
    """What delayed updates need: the backward reads the weight version that it is given."""
    from graphopt.model.controller import controller_of

    model = graphopt.optimize(
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)), backend="eager"
    )
    x = torch.randn(5, 3)
    model(x)
    controller = controller_of(model)
    assert controller is not None
    other = torch.randn(2, 4)
    engine = controller.variants[0].engine
    begin = engine.begin
    engine.begin = lambda values: replace(begin(values), weights={"1.weight": other})
    model(x).sum().backward()
    assert torch.allclose(model[0].weight.grad, other.sum(0).unsqueeze(1) @ x.sum(0).unsqueeze(0))


def test_the_plain_model_runs_inside_other_programs(net: Net) -> None:
    """torch.compile around it, and torch.func transforms, see the model's own forward."""
    from torch.func import functional_call, grad, vmap

    plain = copy.deepcopy(net).eval()
    graphopt.optimize(net, (X,), backend="eager").eval()
    compiled = torch.compile(lambda x: net(x).sum(), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), plain(X).sum())
    parameters = {k: v.detach() * 2 for k, v in net.named_parameters()}
    assert torch.equal(
        functional_call(net, parameters, (X,)), functional_call(plain, parameters, (X,))
    )
    own, expected = (
        grad(lambda p, m=m: functional_call(m, p, (X,)).sum())(parameters) for m in (net, plain)
    )
    assert all(torch.equal(own[k], expected[k]) for k in expected)
    stacked = X.unsqueeze(1)
    assert torch.allclose(vmap(net)(stacked), vmap(plain)(stacked), atol=1e-6)
    assert "joint graph" in net.explain(), "the model must stay optimized"


def test_two_forwards_and_one_backward(net: Net) -> None:
    plain = copy.deepcopy(net)
    graphopt.optimize(net, backend="eager")
    for model in (net, plain):
        torch.manual_seed(4)
        (model(X).sum() + model(X * 2).square().sum()).backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("verify", ["eager", "full"])
def test_an_exact_pass_is_held_to_the_last_bit(net: Net, verify: str) -> None:
    from tests.support.stateful_pass import SlightlyWrong

    graphopt.optimize(net, passes=[SlightlyWrong()], backend="eager", verify=verify)  # type: ignore[call-overload]
    with pytest.raises(graphopt.errors.GraphoptError, match="'slightly_wrong' promises exact"):
        net(X)
    assert type(net) is Net
