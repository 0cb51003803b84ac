"""Objects among the arguments whose tensors grow from call to call, as caches of keys do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError
from graphopt.model.controller import controller_of
from graphopt.model.surface import report
from graphopt.model.tensors import tensors_of
from graphopt.model.trial import named_arguments


class Layer:
    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.owner: object = None


class Cache:
    """As in libraries: no container, layers with tensors, and a way back."""

    def __init__(self, count: int = 1) -> None:
        self.layers = [Layer() for _ in range(count)]
        for layer in self.layers:
            layer.owner = self

    def update(self, number: int, keys: Tensor) -> Tensor:
        layer = self.layers[number]
        layer.keys = keys if layer.keys is None else torch.cat([layer.keys, keys], 1)
        return layer.keys


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        query = self.embed(ids)
        keys = cache.update(0, query)
        weights = torch.softmax(query @ keys.transpose(1, 2), -1)
        return self.head(weights @ keys)


def _generate(model: nn.Module, prompt: Tensor, length: int) -> tuple[Tensor, list[Tensor]]:
    cache, ids, made = Cache(), prompt, []
    with torch.no_grad():
        for _ in range(length):
            out = model(ids, cache)
            ids = out[:, -1:].argmax(-1)
            made.append(out)
    assert cache.layers[0].keys is not None
    return cache.layers[0].keys, made


def _pair(**options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Decoder().eval()
    return plain, graphopt.optimize(copy.deepcopy(plain), backend="eager", **options)


@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(2, 4), st.integers(2, 9)), min_size=2, max_size=4))
def test_generation_is_that_of_eager_at_all_lengths(calls: list[tuple[int, int]]) -> None:
    plain, model = _pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch, length in calls:
            prompt = torch.arange(batch * length).view(batch, length) % 20
            keys, made = _generate(plain, prompt, 6)
            own_keys, own_made = _generate(model, prompt, 6)
            assert torch.equal(keys, own_keys)
            assert all(torch.equal(a, b) for a, b in zip(made, own_made, strict=True))
    controller = controller_of(model)
    assert controller is not None
    # Prompts and steps, each for its first sizes, for other lengths and for other batches.
    assert controller.made <= 6
    assert not report(model).plain


class Inner:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        h = self.layer(x)
        return h if offset is None else h + offset


def test_a_size_that_equals_another_one_is_not_fixed_for_good() -> None:
    plain = Two()
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    for length, offset in ((3, False), (5, False), (6, True), (7, True), (9, True), (8, True)):
        call = (torch.ones(length, 4), *([torch.ones(length, 4)] if offset else []))
        assert torch.equal(model(*call), plain(*call))
    found = [[size.name for size in one.sizes] for one in report(model).specialisations]
    # The third one has to have as many rows as `offset`, which has not varied yet.
    assert found == [[], ["x.0"], ["x.0"], ["x.0", "offset.0"]]
    assert not report(model).notes


class Batch:
    """No container, no dataclass; forward only reads it."""

    def __init__(self, *shape: int) -> None:
        self.inner, self.note = Inner(torch.randn(*shape)), "some words"


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: Batch) -> Tensor:
        return self.layer(batch.inner.x).cumsum(0)


def test_sizes_in_an_object_become_symbols() -> None:
    plain = Reader()
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    for length in (3, 5, 9, 4):
        batch = Batch(length, 4)
        for one in (plain, model):
            one(batch).square().mean().backward()
    assert torch.equal(plain.layer.weight.grad, model.layer.weight.grad)
    first, others = report(model).specialisations
    assert not first.sizes
    assert [str(size) for size in others.sizes] == ["batch.inner.x.0 2.."]
    assert others.because == "batch.inner.x.0 was 3 and is 5"


def test_sizes_in_an_object_can_be_declared() -> None:
    said = {"batch.inner.x": {0: graphopt.Dim("nodes", max=9)}}
    model = graphopt.optimize(Reader(), backend="eager", dynamic=said)
    for length in (3, 7):
        model(Batch(length, 4))
    assert len(report(model).specialisations) == 1
    with pytest.raises(ArgumentError, match=r"batch\.inner\.x\.0 is 10, and dynamic= says"):
        model(Batch(10, 4))
    with pytest.raises(ArgumentError, match=r"of this call has batch\.inner\.x\n"):
        graphopt.optimize(Reader(), backend="eager", dynamic={"batch.y": {0: "n"}})(Batch(3, 4))


def test_what_a_call_is_given() -> None:
    model, cache, ids = Decoder(), Cache(2), torch.ones(1, 3, dtype=torch.long)
    cache.layers[1].keys = torch.ones(2)
    arguments = named_arguments(model, (ids,), {"cache": {"one": cache, "module": model}})
    found = dict(tensors_of(arguments))
    assert list(found) == ["ids", "cache.one.layers.1.keys"]
    assert found["ids"] is ids
