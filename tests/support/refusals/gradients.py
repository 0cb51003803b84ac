"""Gradients that forward or its hooks ask for, and that a captured step lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.refusals.example import Example, Refusal, Small, Way, results, small, train


def retains(s: Small, h: Tensor) -> Tensor:
    h.retain_grad()
    s.kept.append(h)
    return h.tanh()


def retained(model: Any) -> object:
    model(torch.randn(3, 4)).square().sum().backward()
    return [model.kept[-1].grad, *results(model)]


def with_zeros(model: nn.Module) -> object:
    zeros = torch.zeros(3, 4, requires_grad=True)
    model(torch.randn(3, 4), zeros).square().sum().backward()
    return [zeros.grad, *results(model)]


_ZEROS = "^(remove the hook; )?add zeros that require a gradient"
_ADDED = small(lambda s, h, zeros: (h + zeros).tanh())


class Chain(nn.Module):
    """Two layers, of which the first has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(4, 4), nn.Tanh()
        self.register_buffer("table", torch.ones(4))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lin(x))


def hooked_forward() -> nn.Module:
    model = Chain()

    def retain(_: object, __: object, output: Tensor) -> None:
        output.retain_grad()
        model.kept.append(output)

    model.lin.register_forward_hook(retain)
    return model


RETAINED = Refusal(
    "retained",
    "calls `retain_grad()`, also in a forward hook",
    "the gradient is inside of the graph, on no tensor",
    "add zeros that require a gradient to the value: their gradient is its",
    (
        Example(
            "forward",
            small(retains),
            "retain_grad",
            "h.retain_grad()",
            _ZEROS,
            retained,
            way=Way(_ADDED, with_zeros),
        ),
        Example("hook", hooked_forward, "retain_grad", "output.retain_grad()", _ZEROS, retained),
    ),
)


def hooked_backward() -> nn.Module:
    model = Chain()
    model.lin.register_full_backward_hook(lambda m, given, got: model.kept.append(got[0].clone()))
    return model


def hooked_whole() -> nn.Module:
    model = Chain()
    model.register_full_backward_hook(lambda m, given, got: model.kept.append(got[0].clone()))
    return model


def hooked_tensor() -> nn.Module:
    model = Chain()

    def hook(_: object, __: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: model.kept.append(gradient.clone()))

    model.lin.register_forward_hook(hook)
    return model


def recorded(model: Any) -> object:
    found = train(model)
    return [found, *model.kept]


HOOKS = Refusal(
    "hooks",
    "has a full backward hook on a module inside of it, or a tensor hook that stores something",
    "a graph has no such node of autograd",
    "hook zeros that are added to the value, or hook the whole model",
    (
        Example(
            "module",
            hooked_backward,
            "inside of the model has a full backward hook: lin",
            "gradients.py",
            _ZEROS,
            recorded,
            way=Way(hooked_whole, recorded, same=False),
        ),
        Example(
            "tensor", hooked_tensor, "side effect", "register_hook", "inside of a hook", recorded
        ),
    ),
)


def used_up(s: Small, h: Tensor) -> Tensor:
    y = h.square()
    return y * torch.autograd.grad(y.sum(), h)[0]


def kept_graph(s: Small, h: Tensor) -> Tensor:
    y = h.square()
    return y * torch.autograd.grad(y.sum(), h, retain_graph=True)[0]


def inner_backward(s: Small, h: Tensor) -> Tensor:
    h.sum().backward(retain_graph=True)
    return h


DIFFERENTIATES = Refusal(
    "differentiates",
    "calls `backward()` inside of itself; returns what `autograd.grad` has used up",
    "gradients of parameters come from the backward of the call",
    "`torch.autograd.grad` with `create_graph=True` or `retain_graph=True`, `torch.func.grad`",
    (
        Example(
            "grad",
            small(used_up),
            "consumed",
            "torch.autograd.grad(",
            "retain_graph=True",
            way=Way(small(kept_graph), same=False),
        ),
        Example(
            "backward",
            small(inner_backward),
            r"backward\(\)",
            "h.sum().backward",
            r"torch\.func\.grad",
            way=Way(
                small(lambda s, h: h + torch.autograd.grad(h.sin().sum(), h, create_graph=True)[0]),
                same=False,
            ),
        ),
    ),
)


def freezes(s: Small, h: Tensor) -> Tensor:
    s.lin.weight.requires_grad_(False)
    return h * s.lin.weight.sum()


def _passed(model: nn.Module) -> object:
    return train(model, torch.ones(4, requires_grad=True))


_PASSED = Way(small(lambda s, h, one: h * one), _passed)
_MADE = "^make it in __init__, or pass it"
_MARKED = "^call requires_grad_ outside of forward"

MAKES = Refusal(
    "makes",
    "makes parameters, layers or tensors with `requires_grad=True`; calls `requires_grad_()`, "
    "but on a `detach()` that it does not return",
    "no leaf of autograd comes out of a graph",
    "make them in `__init__` or pass them; `detach()`",
    (
        Example(
            "tensor",
            small(lambda s, h: h * torch.ones(4, requires_grad=True)),
            "requires_grad=True",
            "torch.ones(4,",
            _MADE,
            way=_PASSED,
        ),
        Example(
            "parameter",
            small(lambda s, h: h * nn.Parameter(torch.ones(4))),
            r"nn\.Parameter",
            "nn.Parameter(torch.ones(4))",
            _MADE,
            way=_PASSED,
        ),
        Example(
            "layer", small(lambda s, h: nn.Linear(4, 4)(h)), r"nn\.Parameter", "nn.Linear", _MADE
        ),
        Example(
            "output", small(lambda s, h: h.detach().requires_grad_()), "requires_grad_", "", _MARKED
        ),
        Example(
            "frozen",
            small(freezes),
            r"requires_grad_\(\)",
            "weight.requires_grad_(False)",
            _MARKED,
            way=Way(small(lambda s, h: h * s.lin.weight.detach().sum()), same=False),
        ),
    ),
)

ALL = (RETAINED, HOOKS, DIFFERENTIATES, MAKES)
