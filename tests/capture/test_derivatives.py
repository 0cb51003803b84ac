"""Derivatives inside of forward: `torch.autograd.grad` and `torch.func` give eager's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import graphopt
from graphopt.errors import CaptureError
from tests.support.as_graph import AsGraph, assert_equal, assert_same_steps, squares

Body = Callable[["Field", Tensor, Tensor], Any]


class Field(nn.Module):
    """A smooth map of R^5 to R^3, and what `body` makes of it."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU())
        self.last = nn.Linear(8, 3)
        self.body = body

    def map(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, v: Tensor) -> Any:
        return self.body(self, x, v)


def penalty(m: Field, x: Tensor, v: Tensor) -> Any:
    x = x.detach().requires_grad_()
    y = m.map(x)
    return y, torch.autograd.grad(y, x, v, create_graph=True)[0]


def of_parameters(m: Field, x: Tensor, v: Tensor) -> Any:
    y = m.map(x)
    return y, *torch.autograd.grad((y * v).sum(), list(m.parameters()), create_graph=True)


def of_intermediate(m: Field, x: Tensor, v: Tensor) -> Any:
    h = m.net(x)
    y = m.last(h.sin())
    first = torch.autograd.grad((y * v).sum(), h, create_graph=True)[0]
    return y, first, torch.autograd.grad(first.square().sum(), h, create_graph=True)[0]


def laplacian(m: Field, x: Tensor, v: Tensor) -> Any:
    x = x.detach().requires_grad_()
    u = m.map(x).sum(1)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return sum(
        torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(5)
    )


def dropped(m: Field, x: Tensor, v: Tensor) -> Any:
    x = x.detach().requires_grad_()
    y = nn.functional.dropout(m.map(x), 0.3)
    return y, torch.autograd.grad((y * v).sum(), x, create_graph=True)[0]


def kept_graph(m: Field, x: Tensor, v: Tensor) -> Any:
    h = m.net(x)
    y = m.last(h)
    return y, h * torch.autograd.grad((y * v).sum(), h, retain_graph=True)[0]


def unused(m: Field, x: Tensor, v: Tensor) -> Any:
    h = m.net(x)
    found = torch.autograd.grad((h * h).sum(), [h, h.exp()], create_graph=True, allow_unused=True)
    assert found[1] is None
    return m.last(h) * found[0].sum()


FUNCTIONAL: dict[str, Body] = {
    "vjp": lambda m, x, v: (out := vjp(m.map, x))[1](v)[0].square() + out[0].sum(),
    "jvp": lambda m, x, v: jvp(m.map, (x,), (x.cos(),)),
    "grad": lambda m, x, v: grad(lambda x: (m.map(x) * v).sum())(x),
    "vmap of grad": lambda m, x, v: vmap(grad(lambda x, v: (m.map(x) * v).sum()))(x, v),
    "vmap of jvp": lambda m, x, v: vmap(lambda x: jvp(m.map, (x,), (x.cos(),))[1])(x),
    "vmap of vjp": lambda m, x, v: vmap(lambda x, v: vjp(m.map, x)[1](v)[0])(x, v),
    "jacrev": lambda m, x, v: vmap(jacrev(m.map))(x),
    "jacfwd": lambda m, x, v: vmap(jacfwd(m.map))(x),
    "hessian": lambda m, x, v: vmap(hessian(lambda x: m.map(x).sum()))(x),
    "jvp of grad": lambda m, x, v: jvp(grad(lambda x: m.map(x).sum()), (x,), (x.cos(),))[1],
}
BY_AUTOGRAD = [
    *(penalty, of_parameters, of_intermediate, laplacian),
    *(dropped, kept_graph, unused),
]


def _calls(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 5), torch.randn(4, 3)) for _ in range(count)]


@pytest.mark.parametrize("body", BY_AUTOGRAD, ids=lambda body: body.__name__)
def test_autograd_grad(body: Body) -> None:
    assert_same_steps(Field(body), _calls())


@pytest.mark.parametrize("body", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional(body: Body) -> None:
    assert_same_steps(Field(body), _calls())


@pytest.mark.parametrize("gradients", [True, False])
def test_forces_also_without_gradients(gradients: bool) -> None:
    """The force is a derivative in evaluation too, where the caller has turned gradients off."""

    def forces(m: Field, x: Tensor, v: Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = m.map(x).sum(1)
            force = -torch.autograd.grad(energy.sum(), x, create_graph=m.training)[0]
        return (energy if m.training else energy.detach()), force

    model = Field(forces).train(gradients)
    if gradients:
        assert_same_steps(model, _calls())
        return
    graph = AsGraph(model)
    for call in _calls():
        with torch.no_grad():
            assert_equal(model(*call), graph(*call))
    assert len(graph.captures) == 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("body", [penalty, FUNCTIONAL["jvp"]], ids=["autograd", "jvp"])
def test_optimized_in_every_backend(body: Body, backend: str) -> None:
    """Inductor takes no zeros without memory, and graphopt would have fallen back to eager."""
    model = graphopt.optimize(Field(body), backend=backend)
    (call,) = _calls(1)
    squares(model(*call)).backward()
    report = model.explain()
    assert f"backend    {backend}: requested" in report
    assert "verified   eager: " in report


def _returned(m: Field, x: Tensor, v: Tensor) -> Any:
    x = x.detach().requires_grad_()
    return m.map(x), x


def _viewed(m: Field, x: Tensor, v: Tensor) -> Any:
    x = x.detach().requires_grad_()
    return m.map(x), x[1:].sum()


def _kept(m: Field, x: Tensor, v: Tensor) -> Any:
    m.points = x.detach().requires_grad_()
    return m.map(m.points)


def _no_other_leaf(m: Field, x: Tensor, v: Tensor) -> Any:
    x = x.detach().requires_grad_()
    return m.map(v.new_zeros(4, 5)), torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("body", [_returned, _viewed, _kept, _no_other_leaf])
def test_leaves_of_forward_do_not_come_out(body: Body) -> None:
    (call,) = _calls(1)
    with pytest.raises(CaptureError, match=r"requires_grad_\(\)"):
        AsGraph(Field(body))(*call)


def test_what_autograd_has_used_up_is_refused() -> None:
    """Eager raises in the backward: the graph of ``y`` is freed."""

    def frees(m: Field, x: Tensor, v: Tensor) -> Any:
        h = m.net(x)
        y = m.last(h)
        return y + torch.autograd.grad((y * v).sum(), h)[0].sum()

    (call,) = _calls(1)
    with pytest.raises(RuntimeError, match="second time"):
        Field(frees)(*call).sum().backward()
    with pytest.raises(CaptureError, match=r"autograd\.grad"):
        AsGraph(Field(frees))(*call)


def test_backward_inside_is_refused() -> None:
    def backward(m: Field, x: Tensor, v: Tensor) -> Any:
        m.map(x).sum().backward()
        return m.map(x)

    (call,) = _calls(1)
    model = Field(backward)
    with pytest.raises(CaptureError, match=r"backward\(\)"):
        AsGraph(model)(*call)
    assert all(p.grad is None for p in model.parameters())
