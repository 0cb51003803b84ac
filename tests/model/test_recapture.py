"""Numbers that change from call to call are inputs of the graph; what grows stops captures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model.controller import controller_of
from graphopt.model.surface import restore
from graphopt.model.varying import cause_of


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.steps = 0
        self.temperature = 1.0
        self.seen: list[int] = []


class Counter(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.lin(x)


class Annealed(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.temperature *= 0.9
        return self.lin(x) / self.temperature


class Warmup(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.lin(x) * (1 - 0.5**self.steps) + self.steps


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Counter(), nn.Tanh(), Annealed())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Periodic(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.lin(x) if self.steps % 5 else -self.lin(x)


class Growing(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return self.lin(x) + len(self.seen)


class Argument(Base):
    def forward(self, x: Tensor, step: int = 0, rate: float = 1.0) -> Tensor:
        return self.lin(x) * step * rate


class Integers(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.lin(x) + (torch.arange(4) * self.steps + self.steps)


def _compare(
    make: Callable[[], nn.Module], arguments: Callable[[int], tuple[Any, ...]], steps: int = 12
) -> nn.Module:
    torch.manual_seed(0)
    model = graphopt.optimize(make(), backend="eager")
    plain = copy.deepcopy(model)
    restore(plain)
    for step in range(steps):
        x = torch.randn(3, 4)
        for m in (model, plain):
            m.zero_grad()
            m.result = m(x, *arguments(step))
            m.result.square().sum().backward()
        assert torch.equal(model.result, plain.result), step
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), step
        for a, b in zip(model.modules(), plain.modules(), strict=True):
            for name in ("steps", "temperature", "seen"):
                found, expected = getattr(a, name, None), getattr(b, name, None)
                assert found == expected
                assert type(found) is type(expected)
    return model


@pytest.mark.parametrize(
    ("make", "captures"),
    [(Counter, 2), (Annealed, 2), (Warmup, 2), (Nested, 3), (Integers, 2), (Periodic, 4)],
)
def test_attributes_that_forward_writes(make: Callable[[], nn.Module], captures: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = _compare(make, lambda _: ())
    assert controller_of(model).made <= captures


def test_arguments() -> None:
    model = _compare(Argument, lambda step: (step, 1 + step / 7))
    assert controller_of(model).made <= 3


def test_a_schedule_that_the_loop_sets() -> None:
    model = graphopt.optimize(Annealed(), backend="eager")
    for step in range(6):
        model.temperature = 1.0 + step
        model(torch.randn(3, 4))
    assert controller_of(model).made == 1


def test_eval_and_train_of_a_counter() -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(Counter(), backend="eager")
    for _ in range(4):
        for mode in (True, False):
            model.train(mode)(torch.randn(3, 4))
    assert model.steps == 8
    assert controller_of(model).made <= 4


def test_a_list_that_grows_stops_captures_and_is_named() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = _compare(Growing, lambda _: ())
    (said,) = [str(w.message) for w in caught if "call to call" in str(w.message)]
    assert "self.seen changes its length" in said
    assert "self.seen.append" in said or "len(self.seen)" in said
    assert "test_recapture.py" in said
    assert "register_buffer" in said
    assert controller_of(model).made == 5
    assert "self.seen changes its length" in model.explain()


def test_a_number_that_chooses_code_stays_a_constant() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor, task: int) -> Tensor:
            return self.heads[task](x)

    model = graphopt.optimize(Heads(), backend="eager")
    x = torch.randn(3, 4)
    for task in (0, 1, 2, 0, 1, 2):
        assert torch.equal(model(x, task), model.heads[task](x))
    assert controller_of(model).made == 3


@pytest.mark.parametrize(
    ("failure", "name", "number"),
    [
        ("L['self'].n == 0   # self.n += 1  # a.py:3 in forward (HINT: x)", "self.n", True),
        ("L['self'].__dict__['_modules']['l']._modules['1'].k == 3 #", "self.l.1.k", True),
        ("L['step'] == 5", "step", True),
        ("L['opts']['a'][0] == -2.5e-07", "opts['a'][0]", True),
        ("len(L['self'].seen) == 3", "self.seen", False),
        ("not L['self'].seen", "self.seen", False),
    ],
)
def test_what_a_guard_speaks_of(failure: str, name: str, number: bool) -> None:
    cause = cause_of(failure)
    assert cause is not None
    assert (cause.name, cause.number) == (name, number)


@pytest.mark.parametrize(
    "failure",
    [
        "tensor 'L['x']' size mismatch at index 0. expected 4, actual 5",
        "L['self'].training == True",
        "L['mode'] == 'a'",
        "the arguments do not fit",
        "",
    ],
)
def test_what_is_no_number(failure: str) -> None:
    assert cause_of(failure) is None
