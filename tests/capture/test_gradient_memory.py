"""Which gradients lie in one memory decides what in-place work on them does: as in eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import graphopt
from graphopt.capture.gradients import leaf_of
from tests.support.as_graph import AsGraph


class Sum(nn.Module):
    """Adds parameters to its input; the gradient of the sum is that of each term."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.terms = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for term in self.terms:
            x = x + term.view(x.shape)
        return x


def _memories(tensors: list[Tensor]) -> list[int]:
    first: dict[int, int] = {}
    keys = [t.untyped_storage().data_ptr() for t in tensors]
    return [first.setdefault(key, index) for index, key in enumerate(keys)]


CASES = {
    "one shape": (((6,), (6,)), False),
    "a view": (((6,), (2, 3)), False),
    "the input": (((2, 3),), True),
    "many": (((6,), (2, 3), (6,), (3, 2)), True),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("passes", [None, "cleanup"])
def test_gradients_share_memory_as_in_eager(name: str, passes: str | None) -> None:
    shapes, wanted = CASES[name]
    plain = Sum(*shapes)
    twin = copy.deepcopy(plain)
    call: Any = AsGraph(twin)
    if passes is not None:
        call = graphopt.optimize(twin, passes=passes, backend="eager")
    found = []
    for run, model in ((plain, plain), (call, twin)):
        for _ in range(2):
            model.zero_grad()
            x = torch.ones(6, requires_grad=wanted)
            run(x).square().sum().backward()
            tensors = [p.grad for p in model.parameters()] + ([x.grad] if wanted else [])
            found.append(_memories(tensors))
            for tensor in tensors:
                tensor.mul_(3)
            found.append([t.clone() for t in tensors])
    half = len(found) // 2
    assert found[0] == found[half]
    for expected, actual in zip(found[1:half:2], found[half + 1 :: 2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_a_gradient_is_the_tensor_that_backward_was_given_where_it_is_in_eager() -> None:
    found = []
    for run in (Sum((6,), (2, 3)), AsGraph(Sum((6,), (2, 3)))):
        model = run.model if isinstance(run, AsGraph) else run
        given = torch.ones(6)
        run(torch.ones(6)).backward(given)
        for parameter in model.parameters():
            parameter.grad.mul_(5)
        found.append(given)
    assert torch.equal(found[0], found[1])


def test_many_terms_of_one_sum_have_gradients_of_their_own() -> None:
    class Same(Sum):
        def forward(self, x: Tensor) -> Tensor:
            for term in self.terms:
                x = x + term
            return x

    model = graphopt.optimize(Same((6,), (6,), (6,)), passes="cleanup", backend="inductor")
    model(torch.ones(6)).square().sum().backward()
    assert _memories([p.grad for p in model.parameters()]) == [0, 1, 2]


def test_autograd_is_asked_about_numbers_where_sizes_are_numbers() -> None:
    """Symbols would take three times as long as all the rest of a capture."""
    environment = ShapeEnv()
    for value in (torch.zeros(2, 3, requires_grad=True), nn.Parameter(torch.zeros(5))):
        leaf = leaf_of(FakeTensorMode(shape_env=environment), value)
        assert [type(size) for size in leaf.shape] == [int] * value.dim()
        assert leaf.requires_grad
    assert not environment.var_to_range
