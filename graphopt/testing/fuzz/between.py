"""What a training loop does to a model between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from graphopt.testing.fuzz.layers import WIDTH


def sgd(model: nn.Module) -> nn.Module:
    """An optimizer's step, and gradients gone."""
    trained = [p for p in model.parameters() if p.grad is not None]
    if trained:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        torch.optim.SGD(trained, lr=0.05).step()
    model.zero_grad()
    return model


def nothing(model: nn.Module) -> nn.Module:
    """Gradients stay and are added to."""
    return model


def zeros(model: nn.Module) -> nn.Module:
    """Gradients are zeros."""
    model.zero_grad(set_to_none=False)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Half of the parameters are frozen."""
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """All are trained."""
    return model.requires_grad_(True)


def duplicate(model: nn.Module) -> nn.Module:
    """The run goes on with a copy."""
    model.zero_grad()
    return copy.deepcopy(model)


def load(model: nn.Module) -> nn.Module:
    """A checkpoint is loaded."""
    state = {
        name: value * 0.9 if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def data(model: nn.Module) -> nn.Module:
    """Parameters get other memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9
    return model


def hook(model: nn.Module) -> nn.Module:
    """A hook comes to a part and changes what it returns."""
    part = model.get_submodule("first")
    part.register_forward_hook(lambda _module, _args, output: output * 2)
    return model


def hook_on_gradients(model: nn.Module) -> nn.Module:
    """Hooks come to parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g: g * 0.5)  # type: ignore[no-untyped-call]
    return model


def replace(model: nn.Module) -> nn.Module:
    """A part is exchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))
    return model


AFTER: dict[str, Callable[[nn.Module], nn.Module]] = {
    after.__name__: after
    for after in (
        *(sgd, nothing, zeros, freeze, unfreeze, duplicate, load, data),
        *(hook, hook_on_gradients, replace),
    )
}
"""By name."""
