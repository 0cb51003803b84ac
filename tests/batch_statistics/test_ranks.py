"""Several ranks: one large batch in parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.errors import RankError
from graphopt.testing import check_runtime
from tests.batch_statistics.models import batch, check, net, optimized, seen, sgd, small, train
from tests.support.ranks import forked, on_ranks

pytestmark = pytest.mark.distributed

SPEC = "cleanup,batch_statistics{{last={}}},group_gradients{{link=10gbe}}"


def _alike(model: nn.Module) -> None:
    """All that a rank has is what rank 0 has, bit for bit."""
    state: dict[str, Tensor] = {**model.state_dict(), **graphopt.state_dict(model)}
    found: list[Any] = [None, None]
    dist.all_gather_object(found, state)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def _everything(model: nn.Module, own: list[Tensor]) -> dict[str, list[Tensor]]:
    """What norms see on all ranks; each normalises by its own batch."""
    found: list[Any] = [None, None]
    dist.all_gather_object(found, seen(model, own))
    return {name: found[0][name] + found[1][name] for name in found[0]}


def _one_batch(rank: int, last: int, micro: int) -> None:
    model = optimized(net(), SPEC.format(last))
    optimizer = sgd(model)
    steps = []
    for step in range(4):
        # Of another size on each rank, and in the last step.
        sizes = [4 + 2 * rank + i - (step == 3) for i in range(micro)]
        batches = [batch(100 * step + 10 * i + rank, n) for i, n in enumerate(sizes)]
        steps.append(_everything(model, batches))
        train(model, optimizer, batches)
        check(model, steps[-last:])
        _alike(model)
    if rank == 0:  # nobody else has to come
        model.eval()
        with torch.no_grad():
            model(batch(0))
        model.state_dict()


@pytest.mark.parametrize(("last", "micro"), [(1, 1), (3, 2)])
def test_ranks_have_the_statistics_of_one_batch(last: int, micro: int, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _one_batch, last, micro)


class _First(nn.Module):
    """A norm before anything that normalises, so that ranks together see what one process does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3, affine=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(x).mean((2, 3)))
        return result


def _joined(rank: int) -> None:
    torch.manual_seed(0)
    first = _First().double()
    own = [dist.new_group([r]) for r in range(2)][rank]
    alone = optimized(copy.deepcopy(first), "batch_statistics{last=2}", mesh=own)
    model = optimized(first, SPEC.format(2))
    for step in range(3):
        whole = batch(step, 10)
        model(whole.chunk(2)[rank]).square().mean().backward()
        alone(whole).square().mean().backward()
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    assert int(model.norm.num_batches_tracked) == 3


def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _joined)


def _within_ddp(rank: int) -> None:
    model = optimized(net(), "batch_statistics")
    # Its own broadcast of buffers would come before each forward, for nothing.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = sgd(model)
    for step in range(2):
        steps = [_everything(model, [batch(2 * step + rank)])]
        optimizer.zero_grad()
        wrapped(batch(2 * step + rank)).square().mean().backward()
        optimizer.step()
        check(model, steps)
    _alike(model)


def test_gradients_may_be_reduced_by_ddp(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _within_ddp)


def _lowered(rank: int) -> None:
    spec = (
        "cleanup,batch_statistics,kfac{interval=1},"
        "precision{format=fp16,policy=tf,cost=roofline},group_gradients{link=10gbe}"
    )
    model = optimized(net().float(), spec, verify="structure")
    optimizer = sgd(model)
    train(model, optimizer, [batch(rank).float()])
    before = {name: t.clone() for name, t in graphopt.state_dict(model).items()}
    optimizer.zero_grad()
    factor = 1e38 if rank else 1.0  # overflows on one rank
    (model(batch(3 + rank).float()).square().mean() * factor).backward()
    assert all(p.grad is None for p in model.parameters())
    _alike(model)
    after = graphopt.state_dict(model)
    for name, tensor in before.items():
        if name.startswith("batch_statistics/"):
            assert torch.equal(after[name], tensor), name


def test_a_step_that_one_rank_leaves_out_is_left_out_on_all(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _lowered)


def _other_norms(rank: int) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)
            self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor, which: str) -> Tensor:
            result: Tensor = getattr(self, which)(self.head(x))
            return result

    model = optimized(Branch(), "batch_statistics")
    with pytest.raises(RankError, match="differ"):
        model(torch.randn(4, 3), "ab"[rank]).sum().backward()


def test_ranks_with_other_norms_are_told(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _other_norms)


def test_runtime_obligations(monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    check_runtime("batch_statistics{last=3}", model=small)
