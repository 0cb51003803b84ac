"""Tools that read, replace or rewrite weights, on a captured model: as on the plain one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, prune

import graphopt
from graphopt.model.controller import controller_of

X = torch.randn(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def _captured() -> Any:
    model = graphopt.optimize(Net(), backend="eager", cache="off")
    _train(model)
    model.zero_grad()
    return model


def _train(model: nn.Module) -> list[torch.Tensor]:
    y = model(X.to(next(model.parameters()).dtype))
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


def _pruned(model: Any) -> None:
    prune.l1_unstructured(model.head, "weight", 0.5)


def _pruned_for_good(model: Any) -> None:
    prune.random_unstructured(model.head, "weight", 0.5)
    prune.remove(model.head, "weight")


def _swapped(model: Any) -> None:
    torch.utils.swap_tensors(model.head.weight, nn.Parameter(torch.ones(2, 8)))


def _double_by_swapping(model: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _emptied(model: Any) -> None:
    model.to_empty(device="cpu").load_state_dict(Net().state_dict())


def _by_meta(model: Any) -> None:
    saved = Net().state_dict()
    model.to("meta")
    assert model(X.to("meta")).shape == (3, 2)
    model.load_state_dict(saved, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_()


def _clipped(model: Any) -> None:
    _train(model)
    clip_grad_norm_(model.parameters(), 0.1)
    clip_grad_value_(model.parameters(), 0.01)


def _spectral(model: Any) -> None:
    torch.manual_seed(1)
    parametrizations.spectral_norm(model.head)


def _vector(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach() / 2, model.parameters())


TOOLS: dict[str, Callable[[Any], None]] = {
    f.__name__.strip("_"): f
    for f in (
        *(_pruned, _pruned_for_good, _swapped, _double_by_swapping, _emptied, _by_meta),
        *(_clipped, _spectral, _vector),
    )
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_step_after_it_has_the_bits_of_eager(name: str) -> None:
    results = []
    for model in (Net(), _captured()):
        torch.manual_seed(2)
        TOOLS[name](model)
        torch.manual_seed(3)
        results.append(_train(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not controller_of(model).kinds.entries()  # none of the calls ran plain


def test_swapped_where_sizes_are_symbols() -> None:
    model = _captured()
    model(X[:2]).sum().backward()
    _swapped(model)
    plain = Net()
    _swapped(plain)
    assert torch.equal(model(X[:2]), plain(X[:2]))


def test_called_with_other_weights() -> None:
    model, plain = _captured(), Net()
    found = []
    for one in (model, plain):
        weights = {n: torch.ones_like(p).requires_grad_() for n, p in one.named_parameters()}
        y = torch.func.functional_call(one, weights, (X,))
        y.sum().backward()
        found.append([y, *(w.grad for w in weights.values())])
        assert all(p.grad is None for p in one.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(model(X), plain(X))


def test_an_ensemble_by_vmap() -> None:
    weights, buffers = torch.func.stack_module_state([_captured(), Net()])
    model = _captured()

    def call(weights: Any, buffers: Any) -> torch.Tensor:
        return torch.func.functional_call(model, (weights, buffers), (X,))

    both = torch.func.vmap(call)(weights, buffers)
    assert torch.allclose(both, Net()(X).expand(2, 3, 2))


def test_a_pickle_is_plain_and_a_copy_is_optimized() -> None:
    model = _captured()
    plain, twin = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert type(plain) is type(twin) is Net
    assert controller_of(plain) is None
    assert not {"explain", "_graphopt", "forward"} & vars(plain).keys()
    assert controller_of(twin) is not None
    for one in (plain, twin):
        assert torch.equal(one(X), model(X))
