"""Tensors in objects of arguments and results: named, compared, with sizes that vary."""

from __future__ import annotations

import types
import warnings
from abc import ABCMeta
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import graphopt
from graphopt.errors import MismatchError
from graphopt.graph import Graph
from graphopt.model.controller import controller_of
from graphopt.model.tensors import tensors_of
from graphopt.model.trial import describe_call
from graphopt.passbase import EXACT, Applied, Numerics, Outcome, Pass, PassContext


class Store:
    def __init__(self, **tensors: Tensor) -> None:
        self._mapping = tensors


class Batch:
    """Keeps its tensors in a private object, and gives them as attributes, as graphs do."""

    def __init__(self, **tensors: Tensor) -> None:
        self._store = Store(**tensors)

    def __getattr__(self, name: str) -> Tensor:
        mapping = self.__dict__["_store"]._mapping
        if name not in mapping:
            raise AttributeError(name)
        return mapping[name]


class Slotted:
    __slots__ = ("edges", "x")

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges = x, edges


@dataclass
class Fields:
    x: Tensor
    edges: Tensor


# Its module is that of `abc`, as that of a class which a metaclass makes for a library.
Made = ABCMeta("Made", (Batch,), {"__module__": "abc"})


def _names(value: object) -> list[str]:
    return [name for name, _ in tensors_of(value)]


def test_names() -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert _names(a) == ["0"]
    assert _names({"x": a, "y": [a, (b,)]}) == ["x", "y.0", "y.1.0"]
    assert _names({"data": Batch(x=a, edges=b)}) == ["data.x", "data.edges"]
    assert _names({"data": Made(x=a)}) == ["data.x"]
    assert _names({"data": Slotted(a, b)}) == ["data.edges", "data.x"]
    assert _names({"q": deque([a]), "n": types.SimpleNamespace(x=b)}) == ["q.0", "n.x"]
    assert _names({"of": Normal(a, b[:1])}) == ["of.loc", "of.scale"]


def test_names_are_there_once() -> None:
    a, batch = torch.ones(1), Batch(x=torch.ones(1))
    batch._seen = Store(x=a)
    assert _names({"d": batch}) == ["d.x", "d._seen._mapping.x"]
    assert _names({1: a, "1": a}) == ["1", "1_"]


def test_circles_end() -> None:
    a = torch.ones(1)
    ring: list[Any] = [a]
    ring.append(ring)
    batch = Batch(x=a)
    batch.parent = batch
    deep: Any = a
    for _ in range(5000):
        deep = [deep]
    assert _names(ring) == ["0"]
    assert _names(batch) == ["x"]
    assert _names([deep, a]) == ["1"]
    assert _names([batch, nn.Linear(1, 1), Tensor, torch.Generator(), lambda: a]) == ["0.x"]


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, data: Any) -> Tensor:
        h = self.a(data.x).relu()
        sums = torch.zeros_like(h).index_add(0, data.edges[1], h[data.edges[0]])
        return self.b(sums).mean(0)


@pytest.mark.parametrize("kind", [Batch, Slotted, Made])
def test_sizes_in_objects_take_two_captures(kind: Any) -> None:
    model, plain = graphopt.optimize(Graphs(), backend="eager", cache="off"), Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for nodes, edges in ((9, 20), (7, 30), (12, 11), (5, 17), (30, 60)):
            x, pairs = torch.randn(nodes, 4), torch.randint(nodes, (2, edges))
            results = []
            for m in (model, plain):
                m.zero_grad()
                y = m(kind(x=x, edges=pairs))
                y.square().sum().backward()
                results.append([y, *(p.grad for p in m.parameters())])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert controller_of(model).made == 2
    assert "data.x.0 2.." in model.explain()


def test_a_call_with_many_tensors_is_described_in_a_line() -> None:
    model, many = Graphs(), [torch.ones(1)] * 30
    described = describe_call(model, (Store(**{f"t{n}": t for n, t in enumerate(many)}),), {})
    assert described.startswith("data.t0: float32[1], data.t1: float32[1]")
    assert described.endswith("data.t11: float32[1], 18 more (train)")


def test_sizes_in_objects_are_declared() -> None:
    dynamic = {"data.x": {0: "nodes"}, "data.edges": {1: "edges"}}
    model = graphopt.optimize(Graphs(), backend="eager", cache="off", dynamic=dynamic)
    for nodes in (4, 9):
        model(Batch(x=torch.randn(nodes, 4), edges=torch.randint(nodes, (2, nodes + 5))))
    assert controller_of(model).made == 1


def test_a_batch_that_forward_writes_to_is_written_once() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, data: Any) -> Tensor:
            data.x.add_(1)
            return self.a(data.x)

    for kind in (Batch, Made):
        data = kind(x=torch.zeros(3, 2))
        graphopt.optimize(Counts(), backend="eager", cache="off")(data)
        assert torch.equal(data.x, torch.ones(3, 2))


@dataclass(frozen=True)
class Doubles(Pass):
    """Computes the standard deviation by another function."""

    name: ClassVar[str] = "doubles"
    numerics: ClassVar[Numerics] = EXACT

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        node = next(n for n in graph.operators if n.target is torch.ops.aten.exp.default)
        node.target = torch.ops.aten.exp2.default
        return Outcome((Applied("x", "broke"),))


def test_results_in_objects_are_compared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Store:
            return Store(spread=self.a(x).exp())

    model = graphopt.optimize(Model(), passes=[Doubles()], backend="eager", cache="off")
    # Without gradients, of which one may be farther off.
    with torch.no_grad(), pytest.raises(MismatchError, match=r"pass 'doubles'.*spread"):
        model(torch.randn(3, 2))
