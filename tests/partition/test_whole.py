"""The whole model on every rank: who looks, who has to come, and what copies carry."""

from __future__ import annotations

import copy
import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import ArgumentError, RankError
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _trained() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    _optimize(model, optimizer)
    return model, optimizer


def _optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    passes: str = "partition{microbatches=2}",
) -> None:
    found: Any = graphopt.optimize(
        model,
        passes=passes,
        mesh="pp=2",
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
    )
    found.step(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))


def _copies(rank: int) -> None:
    model, optimizer = _trained()
    state = model.state_dict()
    # Copies and pickles are models of their own, and looking at them is no matter of other ranks.
    if rank == 0:
        for other in (copy.deepcopy(model), _pickled(model)):
            assert all(torch.equal(value, state[n]) for n, value in other.state_dict().items())
            with torch.no_grad():
                assert torch.allclose(other(torch.ones(2, 4)), model(torch.ones(2, 4)))
    # Optimizing again does not ask twice.
    _optimize(model, optimizer)
    assert len(model._state_dict_pre_hooks) == 1
    assert sorted(optimizer.state_dict()["state"]) == list(range(6))


def _pickled(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_copies_are_of_one_rank(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _copies)


def _looked_at(rank: int) -> None:
    # Copies, and optimizing again, have what all ranks have trained.
    model, optimizer = _trained()
    twin = copy.deepcopy(model)
    _trained()  # other messages in between
    state = model.state_dict()
    assert all(torch.equal(value, state[n]) for n, value in twin.state_dict().items())
    model, optimizer = _trained()
    _optimize(model, optimizer)
    for name, value in model.state_dict().items():
        torch.distributed.broadcast(other := value.clone(), 0)
        assert torch.equal(other, value), name
    # Nothing that was in flight reaches what is loaded.
    model, optimizer = _trained()
    saved = {n: t.clone() for n, t in model.state_dict().items()}
    _optimize(model, optimizer, "partition{schedule=no_flush,microbatches=2}")
    model.load_state_dict(saved)
    assert all(torch.equal(value, saved[n]) for n, value in model.state_dict().items())
    # Hooks on parameters would not be called.
    model[0].weight.register_hook(lambda g: 2 * g)
    with pytest.raises(ArgumentError, match=r"'0.weight' has a hook on its gradient"):
        model.step(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))


def test_who_looks_sees_all_stages(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _looked_at)


def test_optimizers_with_closures_are_refused() -> None:
    with pytest.raises(ArgumentError, match="LBFGS"):
        graphopt.optimize(nn.Linear(2, 2), passes="partition", optimizer=torch.optim.LBFGS)


def _alone(rank: int) -> None:
    model, _ = _trained()
    if rank == 0:
        with pytest.raises(RankError, match="rank 1 did not come to agree on the whole model"):
            model.state_dict()
    else:
        time.sleep(5)


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _alone, timeout=4)


def _other_batches(rank: int, more: int) -> None:
    model, _ = _trained()
    size = 4 + more * rank
    torch.manual_seed(rank)
    with pytest.raises(RankError) as caught:
        model.step(torch.randn(size, 4), torch.zeros(size, dtype=torch.long))
    if rank == 1:
        assert "were given different batches" in caught.value.message
        assert "shard the data over dp" in caught.value.hint


@pytest.mark.parametrize("more", [0, 1])
def test_ranks_of_one_pipeline_need_one_batch(tmp_path: Path, more: int) -> None:
    on_ranks(tmp_path, 2, _other_batches, more, timeout=4)
