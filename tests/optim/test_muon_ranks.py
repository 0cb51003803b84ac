"""Muon whose ranks orthogonalise a share each: equal on all ranks, and to one process."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import RankError
from graphopt.optim import Muon, muon
from graphopt.optim.shares import longest_first
from tests.support.pipelines import Residual, accumulated, data
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv1d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 12)]
    for _ in range(3):
        layers += [nn.GELU(), nn.Linear(12, 12)]
    return nn.Sequential(*layers, nn.LayerNorm(12), nn.Linear(12, 3))


def batch(seed: int) -> Tensor:
    return torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(seed))


def _same_everywhere(model: nn.Module) -> None:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    assert all(torch.equal(flat, other) for other in every)


def _trains(rank: int) -> None:
    """With `group_gradients`; beside it one process that takes the batches of both ranks."""
    model: Any = graphopt.optimize(net(), passes="cleanup,group_gradients", backend="eager")
    model(batch(rank)).square().mean().backward()
    model.zero_grad()
    optimizer: Any = Muon(model, lr=0.02, process_group=dist.group.WORLD)
    alone = net()
    other = Muon(alone, batch(0), 0.02)
    for number in range(4):
        optimizer.zero_grad()
        model(batch(10 * number + rank)).square().mean().backward()
        optimizer.step()
        other.zero_grad()
        both = torch.cat([batch(10 * number + r) for r in range(2)])
        alone(both).square().mean().backward()
        other.step()
    _same_everywhere(model)
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4, msg=name)
    # What was trained by two goes on with one, and the other way round.
    loaded = Muon(alone, batch(0), 0.02)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    model(batch(rank)).square().mean().backward()
    optimizer.step()
    _same_everywhere(model)


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _trains)


def _same_gradients(rank: int) -> None:
    """Given the same gradients, the update of a rank's share is that of one process."""
    shared, alone = net(), net()
    first = Muon(shared, batch(0), 0.02, process_group=dist.group.WORLD)
    second = Muon(alone, batch(0), 0.02)
    for number in range(3):
        for model, optimizer in ((shared, first), (alone, second)):
            optimizer.zero_grad()
            model(batch(number)).square().mean().backward()
            if number == 1:  # the same on all ranks
                model[3].weight.grad = None
            elif number == 2:
                optimizer.zero_grad()
            optimizer.step()
    _same_everywhere(shared)
    for a, b in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    shared(batch(5)).sum().backward()
    if rank:
        shared[5].weight.grad = None
    with pytest.raises(RankError, match="ranks 0 and 1 have gradients of different"):
        first.step()


def _shares(rank: int) -> None:
    """Each matrix is orthogonalised by one rank."""
    done: list[int] = []
    real = muon.orthogonalised_by_shape

    def counted(matrices: Any, *options: Any) -> list[Tensor]:
        done.append(sum(len(m) for m in matrices))
        return real(matrices, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonalised_by_shape", counted)
        model = net()
        optimizer = Muon(model, batch(0), 0.02, process_group=dist.group.WORLD)
        model(batch(0)).square().mean().backward()
        optimizer.step()
    counts = torch.tensor(done)
    dist.all_reduce(counts)
    assert counts.tolist() == [5]
    # 12 x 32 and the convolution against three of 12 x 12: 4896 to 5184.
    assert done == [3 if rank else 2]


def test_each_rank_has_its_share(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _shares)


def test_the_same_gradients_make_the_same_steps(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _same_gradients)


def _stages(rank: int) -> None:
    """In stages, each rank steps the parameters that it has gradients of."""
    torch.manual_seed(0)
    plain: Any = Residual()
    model: Any = copy.deepcopy(plain)
    theirs, ours = (Muon(m, data(0, 4)[0], 0.02) for m in (plain, model))
    graphopt.optimize(model, passes="partition", mesh="pp=2", loss=F.cross_entropy, optimizer=ours)
    for step in range(3):
        loss = model.step(*data(step, 16))
        expected = accumulated(plain, F.cross_entropy, theirs, data(step, 16), 8)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-2, atol=1e-3, msg=name)


def test_steps_in_stages(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _stages)


@given(costs=st.lists(st.integers(0, 20), max_size=7), ranks=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_shares_are_within_the_bound_of_the_best(costs: list[int], ranks: int) -> None:
    def largest(owners: Any) -> int:
        pairs = list(zip(costs, owners, strict=True))
        return max(sum(c for c, o in pairs if o == r) for r in range(ranks))

    owners = longest_first(costs, ranks)
    best = min(largest(choice) for choice in product(range(ranks), repeat=len(costs)))
    assert largest(owners) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_pieces_of_equal_cost_are_dealt_in_order() -> None:
    assert longest_first([5, 5, 5, 5, 9], 2) == [1, 1, 0, 1, 0]
    assert longest_first([], 4) == []
