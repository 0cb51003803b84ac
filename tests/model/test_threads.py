"""Calls from several threads, first calls included."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model.controller import controller_of


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


X = torch.randn(4, 8)


def _together(*work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run(what: Callable[[], None]) -> None:
        try:
            what()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(what,)) for what in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)


def test_three_threads_with_models_of_their_own() -> None:
    called = nn.Module.__call__
    expected = _net()(X)

    def work(models: list[nn.Module]) -> None:
        for model in models:
            y = model(X)
            y.sum().backward()
            assert torch.equal(y, expected)
            assert controller_of(model).made == 1

    # Made beforehand: the random stream that draws weights is of the process.
    own = [[graphopt.optimize(_net(), backend="eager") for _ in range(3)] for _ in range(3)]
    _together(*(partial(work, models) for models in own))
    assert nn.Module.__call__ is called
    compiled = torch.compile(_net(), backend="aot_eager")
    assert torch.allclose(compiled(X), expected)


def test_beside_torch_compile_and_plain_pytorch() -> None:
    expected = _net()(X)
    own = graphopt.optimize(_net(), backend="eager")
    others = [torch.compile(_net(), backend="aot_eager", dynamic=False) for _ in range(3)]
    untouched = _net()

    def optimized() -> None:
        for batch in range(1, 6):
            own(X[:1].expand(batch, 8))
        assert controller_of(own).made == 2, "some calls ran plain, while others compiled"
        assert not controller_of(own).notes

    def compiled() -> None:
        for model in others:
            assert torch.allclose(model(X), expected)

    def plain() -> None:
        for _ in range(200):
            assert torch.equal(untouched(X), expected)

    _together(optimized, compiled, plain)


@pytest.mark.parametrize(
    ("same", "dynamic", "captures"),
    [(True, False, (1,)), (False, False, (4,)), (True, None, (1,)), (False, None, (2, 3))],
)
def test_one_model_from_four_threads(
    same: bool, dynamic: bool | None, captures: tuple[int, ...]
) -> None:
    plain = _net().eval()
    model = graphopt.optimize(_net(), backend="eager", dynamic=dynamic).eval()
    inputs = [torch.randn(3 if same else i + 1, 8) for i in range(4)]

    def work(x: Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(50):
                assert torch.equal(model(x), plain(x))

        return run

    _together(*map(work, inputs))
    assert controller_of(model).made in captures


def test_two_kinds_of_calls_change_places() -> None:
    model = graphopt.optimize(_net(), backend="eager").eval()
    model(X)
    model(X[:2])

    def work() -> None:
        for i in range(500):
            assert len(model(X[: 2 + 2 * (i % 2)])) == 2 + 2 * (i % 2)

    _together(work, work, work)
    assert controller_of(model).made == 2
    assert len(controller_of(model).variants) == 2
