"""State outside of the model that decides what forward does: guarded, refused, or run plain."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

import graphopt
from graphopt.capture import is_uninitialised, runs_plain
from graphopt.errors import CaptureError
from tests.support.as_graph import AsGraph, assert_same_steps


def test_variables_of_a_closure() -> None:
    factor = 1.0
    shift = torch.ones(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) * factor + shift

    model = Model()
    graph = AsGraph(model)
    for factor in (1.0, 5.0, 1.0):  # noqa: B007
        assert torch.equal(graph(torch.ones(3, 4)), model(torch.ones(3, 4)))
    assert len(graph.captures) == 2
    shift = torch.full((1,), 7.0)
    assert torch.equal(graph(torch.ones(3, 4)), model(torch.ones(3, 4)))


def test_forward_hooks_on_all_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graph = AsGraph(model)
    x = torch.randn(3, 4)

    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output * 2 if isinstance(module, nn.Linear) else None

    graph(x)
    handle = of_all_modules.register_module_forward_hook(double)
    try:
        assert torch.equal(graph(x), model(x))
        assert len(graph.captures) == 2
    finally:
        handle.remove()
    assert torch.equal(graph(x), model(x))
    assert len(graph.captures) == 2


def test_what_runs_plain() -> None:
    assert not runs_plain()
    handle = of_all_modules.register_module_full_backward_hook(lambda *_: None)
    assert runs_plain()
    handle.remove()
    assert not runs_plain()


def test_lazy_modules_are_seen() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    assert is_uninitialised(model)
    model(torch.randn(2, 4))
    assert not is_uninitialised(model)


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.draw()


def test_draws_that_become_inputs_are_drawn_at_each_call() -> None:
    model = Draws(lambda: random.randint(0, 100))
    graph = AsGraph(model)
    x = torch.randn(2, 4)
    for seed in range(3):
        random.seed(seed)
        expected = model(x)
        random.seed(seed)
        assert torch.equal(graph(x), expected)
        after = random.getstate()
        random.seed(seed)
        model(x)
        assert random.getstate() == after
    assert len(graph.captures) == 1


def test_draws_of_a_generator_of_ones_own() -> None:
    """Dynamo would draw once, and leave the generator where it was then."""
    own = random.Random(3)
    x = torch.randn(2, 4)
    for draw in (own.random, lambda: own.uniform(0, 1), lambda: random.Random().uniform(0, 1)):
        before = own.getstate()
        with pytest.raises(CaptureError) as caught:
            AsGraph(Draws(draw))(x)
        assert caught.value.hint.startswith("draw by torch")
        assert own.getstate() == before
    # One that forward makes and seeds draws the same at every call.
    assert_same_steps(Draws(lambda: random.Random(3).uniform(0, 1)), [(x,)] * 3, captures=1)


class Fills(nn.Module):
    """Makes a tensor where the default device is."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.lin(x) + 1, torch.ones(2)


def test_the_default_device() -> None:
    x = torch.ones(3, 4)
    for first in (torch.device("cpu"), nullcontext()):
        model = Fills()
        graph = AsGraph(model)
        for device in (first, torch.device("meta"), torch.device("cpu"), first):
            with device:
                (y, made), (expected, like) = graph(x), model(x)
            assert torch.equal(y, expected)
            assert made.device == like.device
        y.sum().backward()
        assert len(graph.captures) == (2 if first == torch.device("cpu") else 3)
    try:
        torch.set_default_device("cpu")
        graph = AsGraph(model)
        graph(x)[0].sum().backward()
        graph(x)
    finally:
        torch.set_default_device(None)
    assert len(graph.captures) == 1


def test_what_is_made_on_the_meta_device_is_compared_with_eager() -> None:
    model, x = Fills(), torch.ones(3, 4)
    graphopt.optimize(model, backend="eager", fallback="error")
    for name in ("cpu", "meta", "cpu"):
        with torch.device(name):
            y, made = model(x)
        assert (y.device.type, made.device.type) == ("cpu", name)


def test_a_refused_call_leaves_the_attributes_of_a_function() -> None:
    def draw() -> float:
        draw.calls += 1  # type: ignore[attr-defined]
        return 2.0

    draw.calls = 0  # type: ignore[attr-defined]
    model = graphopt.optimize(Draws(draw), backend="eager")
    with pytest.raises(CaptureError, match=r"setattr\(\)"):
        model(torch.ones(3, 4))
    assert draw.calls == 0  # type: ignore[attr-defined]


def test_draws_of_torch() -> None:
    assert_same_steps(Draws(lambda: torch.rand(()).item()), [(torch.randn(2, 4),)] * 3)


class Remembers(nn.Module):
    """Computes with the last three of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.last: deque[Tensor] = deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        self.last.append(h.detach().sum())
        return h * len(self.last) + self.last[0]


def test_a_deque_forgets_as_in_eager() -> None:
    """Dynamo takes each deque for one without end."""
    model, calls = Remembers(), [(torch.randn(2, 4),) for _ in range(6)]
    graph = assert_same_steps(model, calls, captures=4)
    assert len(model.last) == len(graph.model.last) == 3
