"""What a user says of sizes, and calls that break it: one sentence, and the model goes on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Dim
from graphopt.errors import ArgumentError, CaptureError
from graphopt.model.controller import controller_of
from graphopt.passbase import Outcome, Pass


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.lin(x)
        return h if mask is None else h * mask[:, None]


class Batched(Masked):
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.lin(batch["x"]) * batch["weight"][:, None]


class Named(Masked):
    def forward(self, **tensors: Tensor) -> Tensor:  # type: ignore[override]
        return self.lin(tensors["x"])


class Positions(Masked):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.lin(x) + self.table


class Static(Pass):
    name = "static_only"

    def apply(self, graph: Any, ctx: Any) -> Outcome:
        return Outcome()


def _optimized(make: Callable[[], nn.Module], dynamic: Any = None, **options: Any) -> nn.Module:
    settings = {"backend": "eager", "verify": "structure", "passes": ""} | options
    return graphopt.optimize(make(), dynamic=dynamic, **settings)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min": -1}, r"min=-1 of Dim\('n'\) is no whole number from 0 on"),
        ({"max": 2.5}, r"max=2.5 of Dim\('n'\)"),
        ({"multiple": 0}, r"multiple=0 of Dim\('n'\) is no whole number from 1 on"),
        ({"min": 5, "max": 3}, "max=3 below min=5"),
        ({"min": 5, "max": 7, "multiple": 8}, r"no multiple of 8 is within 5\.\.7"),
    ],
)
def test_limits_that_no_size_has(values: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Dim("n", **values)


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"tokens": {0: "batch"}}, "names 'tokens', and forward takes x, mask"),
        ({"x": "batch"}, "gives 'batch' for 'x', which is no dict of dimensions"),
        ({"x": {0: 3}}, "gives 3 for dimension 0 of 'x'"),
        ({"x": {0: ""}}, "a Dim has the name ''"),
        ("batch", "dynamic='batch' is neither False nor a dict"),
        (
            {"x": {0: Dim("n", max=8)}, "mask": {0: Dim("n", max=16)}},
            r"x\.0 is n of 0\.\.8 and mask\.0 is n of 0\.\.16",
        ),
    ],
)
def test_declarations_that_make_no_sense(dynamic: Any, said: str) -> None:
    model = Masked()
    with pytest.raises(ArgumentError, match=said):
        graphopt.optimize(model, dynamic=dynamic)
    assert controller_of(model) is None


@pytest.mark.parametrize(
    ("make", "dynamic", "args", "said"),
    [
        (Masked, {"x": {3: "n"}}, (_x(3, 4),), "names dimension 3 of x, which has 2"),
        (
            Batched,
            {"batch": {0: "n"}},
            ({"x": _x(3, 4), "weight": _x(3)},),
            "'batch' of this call has batch.x, batch.weight",
        ),
        (Masked, {"mask": {0: "n"}}, (_x(3, 4), 2.0), "'mask' of this call holds no tensor"),
    ],
)
def test_what_is_declared_and_not_there(make: Any, dynamic: Any, args: Any, said: str) -> None:
    model = _optimized(make, dynamic)
    with pytest.raises(ArgumentError, match=said):
        model(*args)
    assert controller_of(model) is not None


def test_sizes_outside_of_what_was_declared() -> None:
    rows = Dim("rows", min=4, max=16, multiple=4)
    model = _optimized(Masked, {"x": {0: rows}, "mask": {0: "rows"}})
    assert model(_x(8, 4), _x(8)).shape == (8, 4)
    for size, said in ((20, r"x\.0 is 20, .* rows of 4\.\.16, a multiple of 4"), (6, "is 6")):
        with pytest.raises(ArgumentError, match=said):
            model(_x(size, 4), _x(size))
    with pytest.raises(ArgumentError, match=r"x\.0 is 8 and mask\.0 is 4, .* both are 'rows'"):
        model(_x(8, 4), _x(4))
    with pytest.raises(ArgumentError, match=r"mask\.0 is 1, "):
        model(_x(8, 4), _x(1))
    assert model(_x(16, 4), _x(16)).shape == (16, 4)
    assert controller_of(model).made == 1


def test_sizes_of_keyword_arguments_and_of_dicts() -> None:
    model = _optimized(Named, {"x": {0: "n"}})
    assert [model(x=_x(n, 4)).shape[0] for n in (3, 5)] == [3, 5]
    assert controller_of(model).made == 1
    model = _optimized(Batched, {"batch.x": {0: "n"}, "batch.weight": {0: "n"}})
    assert [model({"x": _x(n, 4), "weight": _x(n)}).shape[0] for n in (3, 5)] == [3, 5]
    assert controller_of(model).made == 1


def test_sizes_that_must_be_equal_and_are_not_raise_what_eager_raises() -> None:
    model = _optimized(Masked, {"x": {0: "rows"}, "mask": {0: "others"}})
    model(_x(3, 4), _x(3)).sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must match the size") as caught:
            model(_x(5, 4), _x(4))
        assert not isinstance(caught.value, graphopt.errors.GraphoptError)
    assert model(_x(6, 4), _x(6)).shape == (6, 4)
    assert controller_of(model).made == 1


def test_a_declared_size_that_the_model_fixes_is_refused_with_the_line() -> None:
    model = _optimized(Positions, {"x": {0: "rows"}})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError, match=r"x\.0 is declared to vary, .* for 6 only") as caught:
        model(_x(6, 4))
    assert "self.lin(x) + self.table" in caught.value.where
    assert "leave it out of dynamic=" in caught.value.hint
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert controller_of(model).made == 0


def test_sizes_of_zero_and_one() -> None:
    torch.manual_seed(0)
    model = _optimized(Masked, {"x": {0: "n"}, "mask": {0: "n"}}, verify="eager")
    plain = copy.deepcopy(model)
    graphopt.model.surface.restore(plain)
    for n in (1, 4, 0, 7, 1, 0):
        x, mask = _x(n, 4), _x(n)
        gradients = []
        for one in (model, plain):
            one.zero_grad()
            one(x, mask).square().sum().backward()
            gradients.append([p.grad for p in one.parameters()])
        assert all(map(torch.equal, *gradients))
    assert controller_of(model).made == 3


def test_a_pass_that_takes_no_symbols_says_so_once_where_they_are_declared() -> None:
    model = _optimized(Masked, {"x": {0: "n"}}, passes=[Static()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (3, 4):
            model(_x(n, 4))
    (said,) = caught
    assert said.filename == __file__
    assert "dynamic= declares x.0" in str(said.message)
    assert "the pass 'static_only' takes graphs of fixed sizes only" in str(said.message)
    assert "the pass 'static_only'" in model.explain()
