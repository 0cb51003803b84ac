"""Models of the corpus with the batch as a symbol: one graph has the bits of eager at each size."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.model.controller import controller_of
from graphopt.testing.corpus import CORPUS

pytestmark = pytest.mark.corpus

NAMES = [
    "mobilenet",
    "group_and_instance_norm",
    "tied_language_model",
    "used_twice",
    "checkpointed",
    "in_place",
    "running_statistics",
]


def _batch(args: Any) -> int:
    first = next(v for v in pytree.tree_leaves(args) if isinstance(v, Tensor))
    return first.shape[0]


def _grown(args: Any, size: int) -> Any:
    """The arguments with as many examples more as one of them has, where they have as many."""

    def one(value: object) -> object:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != size:
            return value
        return torch.cat([value, value[:1].roll(1, -1)])

    return pytree.tree_map(one, args)


def _dynamic(model: nn.Module, args: Any, kwargs: Any) -> dict[str, dict[int, str]]:
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    size = _batch((args, kwargs))
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.dim()}
    return {n: {0: "batch"} for n, v in tensors.items() if v.shape[0] == size}


def _step(model: nn.Module, args: Any, kwargs: Any, loss: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(5)
    model.zero_grad()
    value = loss(model(*args, **kwargs))
    value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": value.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_all_batches(name: str) -> None:
    entry = CORPUS[name]
    plain, args, kwargs = entry.make()
    dynamic = _dynamic(plain, args, kwargs)
    model = graphopt.optimize(
        copy.deepcopy(plain), passes="cleanup", backend="eager", verify="off", dynamic=dynamic
    )
    for _ in range(2):
        expected = _step(plain, args, kwargs, entry.loss)
        actual = _step(model, args, kwargs, entry.loss)
        for key, value in expected.items():
            own = actual[key]
            assert (value is None) == (own is None), key
            assert value is None or own is None or torch.equal(value, own), key
        args, kwargs = _grown((args, kwargs), _batch((args, kwargs)))
    controller = controller_of(model)
    assert controller is not None
    assert controller.made == 1, model.explain()
