"""Sizes that vary from call to call: few captures, and the bits of eager."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError
from graphopt.model.controller import controller_of
from graphopt.passbase import Outcome, Pass


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        h = self.norm(self.embed(ids)).cumsum(1)
        return self.head(h if weight is None else h * weight[:, None, None])


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 16, shape)


def _train(model: nn.Module, calls: Sequence[tuple[Any, ...]]) -> None:
    """Compare each step with eager's."""
    plain = copy.deepcopy(model)
    graphopt.model.surface.restore(plain)
    for call in calls:
        results = []
        for m in (model, plain):
            m.zero_grad()
            y = m(*call)
            y.square().mean().backward()
            results.append([y, *(p.grad for p in m.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def _made(model: nn.Module) -> int:
    return controller_of(model).made


def test_lengths_and_batches_take_three_captures() -> None:
    model = graphopt.optimize(Tokens(), backend="eager")
    shapes = [(4, 5), (4, 9), (6, 9), (3, 7), (9, 30), (4, 6), (2, 2), (5, 40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(model, [(_ids(*shape),) for shape in shapes])
    assert _made(model) == 3
    assert "sizes      ids.0 2.., ids.1 2.." in model.explain()


def test_one_capture_where_the_user_says_so() -> None:
    dynamic = {"ids": {0: "batch", 1: graphopt.Dim("length", max=64)}}
    model = graphopt.optimize(Tokens(), (_ids(4, 5),), backend="eager", dynamic=dynamic)
    _train(model, [(_ids(*shape),) for shape in ((3, 9), (8, 64), (4, 5))])
    assert _made(model) == 1


def test_dynamic_false_captures_each_size() -> None:
    model = graphopt.optimize(Tokens(), backend="eager", dynamic=False)
    _train(model, [(_ids(n, 5),) for n in (3, 4, 5, 3)])
    assert _made(model) == 3


def test_evaluation_and_a_last_batch_of_one() -> None:
    model = graphopt.optimize(Tokens(), backend="eager")
    _train(model, [(_ids(n, 5),) for n in (4, 6, 3, 1, 1, 8)])
    assert _made(model) == 3
    with torch.no_grad():
        for n in (2, 7, 5):
            assert model.eval()(_ids(n, 5)).shape == (n, 5, 3)
    assert _made(model) == 4


def test_two_tensors_of_one_batch() -> None:
    model = graphopt.optimize(Tokens(), backend="eager")
    _train(model, [(_ids(n, 5), torch.rand(n)) for n in (4, 6, 3, 9)])
    assert _made(model) == 2


def test_an_expanded_batch() -> None:
    row = torch.randint(0, 16, (1, 5))
    model = graphopt.optimize(Tokens(), backend="eager")
    _train(model, [(row.expand(n, 5),) for n in (4, 6, 3, 9)])
    assert _made(model) == 2


class Messages(nn.Module):
    """A graph convolution that leaves loops out, so that the number of messages depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.lin(x)
        kept = edges[:, edges[0] != edges[1]]
        return torch.zeros_like(h).index_add(0, kept[1], h[kept[0]])


def test_graphs_of_many_sizes_take_three_captures() -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(Messages(), backend="eager")
    sizes = [(10, 30), (10, 41), (12, 17), (9, 55), (31, 2), (5, 90)]
    _train(model, [(torch.randn(n, 8), torch.randint(0, n, (2, m))) for n, m in sizes])
    assert _made(model) <= 3


class Static(Pass):
    name = "static_only"

    def apply(self, graph: Any, ctx: Any) -> Outcome:
        return Outcome()


def test_a_pass_that_takes_no_symbols_says_so() -> None:
    model = graphopt.optimize(Tokens(), backend="eager", passes=[Static()])
    _train(model, [(_ids(n, 5),) for n in (4, 6, 3)])
    assert _made(model) == 3
    assert "the pass 'static_only' takes graphs of fixed sizes only" in model.explain()


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * torch.tensor([1.0] * int(x.shape[0]))[:, None]


def test_a_size_that_the_model_fixes_is_named() -> None:
    model = graphopt.optimize(Fixed(), backend="eager")
    _train(model, [(torch.randn(n, 4),) for n in (4, 6, 3)])
    assert _made(model) == 3
    assert "x.0 varies, and each of its sizes has a graph of its own" in model.explain()


def test_a_declared_size_that_the_model_fixes_is_refused() -> None:
    model = graphopt.optimize(Fixed(), backend="eager", dynamic={"x": {0: "batch"}})
    with pytest.raises(CaptureError, match=r"x\.0 is declared to vary.*for 4 only") as caught:
        model(torch.randn(4, 4))
    assert "int(x.shape[0])" in str(caught.value)


def test_memory_stays_flat_over_many_sizes() -> None:
    import gc

    model = graphopt.optimize(Tokens(), backend="eager")
    for n in (2, 3):
        model(_ids(4, n)).sum().backward()
    gc.collect()
    before = len(gc.get_objects())
    for n in range(4, 204):
        model(_ids(4, n)).sum().backward()
    gc.collect()
    assert len(gc.get_objects()) < before + 100
    assert _made(model) == 2
