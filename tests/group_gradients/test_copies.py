"""A deep copy of an optimized model in a job has its own messages, counters and late gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import graphopt
from graphopt.model.controller import controller_of
from tests.support.models import batch, mlp
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _messages(model: Any) -> Any:
    controller = controller_of(model)
    assert controller is not None
    return controller.session.part("group_gradients").messages


def _train(model: Any, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    model(batch("mlp", 10 * step + rank)).square().mean().backward()
    optimizer.step()


def _sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _own_late_gradients(rank: int) -> None:
    model: Any = graphopt.optimize(
        mlp(), passes="group_gradients{stale=double_buffer}", backend="eager"
    )
    optimizer = _sgd(model)
    for step in range(3):
        _train(model, optimizer, rank, step)
    twin = copy.deepcopy(model)
    assert _messages(twin).ranks.channel != _messages(model).ranks.channel
    assert _messages(twin).step == 0
    others = _sgd(twin)
    for step in range(3, 6):  # in turns, on the same data
        _train(model, optimizer, rank, step)
        _train(twin, others, rank, step)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
    _train(twin, others, rank, 7)
    assert (_messages(model).step, _messages(twin).step) == (6, 4)


def test_a_copy_continues_on_its_own(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _own_late_gradients, timeout=20)


def _average_on_one_rank(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager")
    if rank == 0:
        early = copy.deepcopy(model)
        with torch.no_grad():
            early(batch("mlp", 0))
    optimizer = _sgd(model)
    _train(model, optimizer, rank, 0)
    if rank == 0:
        for average in (early, copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
            for size in (6, 3):
                x = batch("mlp", 0)[:size]
                plain = mlp()
                plain.load_state_dict(average.state_dict())
                with torch.no_grad():
                    torch.testing.assert_close(average(x), plain(x))
                torch.testing.assert_close(average(x), plain(x))  # captured with its backward
    _train(model, optimizer, rank, 1)
    # What rank 0 did alone does not shift how ranks find each other afterwards.
    _train(twin := copy.deepcopy(model), _sgd(twin), rank, 2)
    second: Any = graphopt.optimize(mlp(), backend="eager")
    _train(second, _sgd(second), rank, 0)
    for trained in (model, twin, second):
        weights: list[Any] = [None, None]
        dist.all_gather_object(weights, [p.detach() for p in trained.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_an_averaged_copy_on_one_rank_does_not_hang(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _average_on_one_rank, timeout=30)


def _silence_is_its_own(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager")
    twin = copy.deepcopy(model)
    with twin.no_sync():
        twin(batch("mlp", rank)).square().mean().backward()
        model(batch("mlp", rank)).square().mean().backward()
    local, reduced = ([p.grad for p in m.parameters()] for m in (twin, model))
    for alone, mean in zip(local, reduced, strict=True):
        total = alone.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(mean, total / 2, rtol=1e-5, atol=1e-7)
    assert controller_of(twin).session.pending
    assert not controller_of(model).session.pending


def test_no_sync_of_a_copy_leaves_the_original_alone(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _silence_is_its_own, timeout=20)
