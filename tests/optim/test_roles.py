"""Roles of a model as users get them, and the parameter groups made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError, CaptureError
from graphopt.optim import LARC, ParameterRoles, groups, parameter_roles
from graphopt.testing.fuzz.observe import difference, state_of


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if float(y.sum()) > 0 else -y


def test_roles_leave_the_model_as_it_was() -> None:
    model, x = net(), images()
    before, random = state_of(model), torch.get_rng_state()
    roles = parameter_roles(model, x)
    assert not difference(before, state_of(model))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles.parameters["0.weight"] is model[0].weight


def test_the_table_can_be_read() -> None:
    lines = str(parameter_roles(net(), images())).splitlines()
    assert lines[0].split() == ["parameter", "shape", "role", "as", "a", "matrix", "because"]
    assert lines[1].startswith("0.weight   4 x 3 x 3 x 3  convolution  4 x 27")
    assert lines[-1] == "6 parameters: 2 bias, 2 norm, 1 convolution, 1 head"


def test_an_optimized_model_is_not_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    model = graphopt.optimize(net(), x, backend="eager")
    monkeypatch.setattr(graphopt.capture, "capture", None)
    known = parameter_roles(model)
    assert dict(known) == dict(parameter_roles(model, x))
    monkeypatch.undo()
    assert dict(parameter_roles(net(), x)) == dict(known)
    model.eval()  # another kind of call
    assert dict(parameter_roles(model, x)) == dict(known)


def test_norms_biases_and_vectors_are_not_decayed() -> None:
    model = net()
    model[3].register_parameter("idle", nn.Parameter(torch.zeros(2, 2)))
    model[4].bias.requires_grad_(False)
    made = groups(model, images(), weight_decay=1e-4, lr=0.1)
    assert [g["weight_decay"] for g in made] == [1e-4, 0.0]
    assert [g["adaptive"] for g in made] == [True, False]
    assert [[n for n, _ in g["params"]] for g in made] == [
        ["0.weight", "3.idle", "4.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]
    optimizer = torch.optim.SGD(made, momentum=0.9)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]
    model(images()).square().mean().backward()
    LARC(optimizer).step()


def test_groups_of_roles_and_of_a_captured_model_are_the_same() -> None:
    model = graphopt.optimize(net(), images(), backend="eager")
    roles = parameter_roles(model)
    for made in (groups(roles, weight_decay=0.1), groups(model, weight_decay=0.1)):
        assert [len(g["params"]) for g in made] == [2, 4]
    vectors = {n: r for n, r in roles.items() if r.vector}
    only = ParameterRoles(vectors, {n: roles.parameters[n] for n in vectors})
    assert [g["adaptive"] for g in groups(only, weight_decay=0.1)] == [False]


def _frozen() -> Any:
    return parameter_roles(net().requires_grad_(False), images())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: parameter_roles(net()), ArgumentError, "'input', and there is no example"),
        (lambda: parameter_roles([1]), ArgumentError, "this is a list"),
        (lambda: parameter_roles(nn.LazyLinear(3), images()), ArgumentError, "'weight'"),
        (_frozen, ArgumentError, "no parameter of Sequential gets a gradient"),
        (lambda: parameter_roles(Breaks(), torch.ones(2, 3)), CaptureError, "test_roles.py"),
        (lambda: groups(net(), images(), weight_decay=-1.0), ArgumentError, "below 0"),
        (lambda: groups(net(), 3, weight_decay=0.0), ArgumentError, "example_inputs"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert says in str(raised.value)
