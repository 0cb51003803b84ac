"""torch's pipeline runtime accepts our schedules, and trains by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from graphopt.errors import ArgumentError
from graphopt.schedules.actions import Schedule
from graphopt.schedules.generate import generate, interleaved
from graphopt.schedules.laws import SYNCHRONOUS
from graphopt.schedules.torch_runtime import torch_runtime
from graphopt.schedules.transfers import with_transfers
from tests.support.ranks import on_ranks


class Described(_PipelineStageBase):
    """A stage of which only the numbers are known, which is all that loading a schedule reads."""

    def __init__(self, stages: int, ranks: int) -> None:
        self.num_stages, self.group_size, self.group_rank = stages, ranks, 0
        self.stage_index, self.group, self.has_backward = 0, None, True

    def _create_grad_recv_info(self, *args: Any) -> Any:
        raise NotImplementedError

    def _get_init_p2p_neighbors_ops(self) -> Any:
        raise NotImplementedError

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def _loaded(schedule: Schedule) -> list[list[str]]:
    """What the runtime will run on each rank, without what it adds for sharded parameters."""
    stage = Described(schedule.stages, len(schedule.ranks))
    runtime = torch_runtime(schedule, [stage], loss=nn.functional.mse_loss)
    extra = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
    lines = {
        rank: [a for a in line if not str(a).endswith(extra)]
        for rank, line in runtime.pipeline_order_with_comms.items()
    }
    place = dict(enumerate(schedule.placement))
    schedules._simulate_comms_compute(lines, place.__getitem__, schedule.stages)  # no deadlock
    return [[str(a) for a in lines[rank]] for rank in range(len(schedule.ranks))]


@pytest.mark.parametrize("kind", [*SYNCHRONOUS, "interleaved"])
@pytest.mark.parametrize("transfers", [True, False])
def test_torch_loads_schedules(kind: str, transfers: bool) -> None:
    for ranks, batches in ((2, 2), (3, 6), (4, 8)):
        if kind == "interleaved":
            schedule = interleaved(ranks, 2, batches)
        else:
            schedule = generate(kind, ranks, batches)
        wanted = [[str(a) for a in line] for line in with_transfers(schedule).ranks]
        found = _loaded(with_transfers(schedule) if transfers else schedule)
        if transfers:
            assert found == wanted
        else:  # torch places sends and receives by its own rule
            assert [sorted(line) for line in found] == [sorted(line) for line in wanted]


def _pieces() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(4, 6), nn.Tanh()),
        nn.Sequential(nn.Linear(6, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 4), nn.Tanh()),
        nn.Linear(4, 3),
    ]


def _train(rank: int, kind: str, transfers: bool) -> None:
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    dist.broadcast(x, 0)
    dist.broadcast(y, 0)
    pieces = _pieces()
    if kind == "interleaved":
        schedule, own = interleaved(2, 2, 4), [rank, rank + 2]
    else:
        schedule, own = generate(kind, 2, 4), [rank]
        pieces = [nn.Sequential(*pieces[:2]), nn.Sequential(*pieces[2:])]
    if transfers:
        schedule = with_transfers(schedule)
    stages = [PipelineStage(pieces[s], s, len(pieces), torch.device("cpu")) for s in own]
    runtime = torch_runtime(schedule, stages, loss=nn.functional.mse_loss)
    if rank == 0:
        runtime.step(x)
    else:
        runtime.step(target=y)
    whole = nn.Sequential(*_pieces())
    for one, target in zip(x.chunk(4), y.chunk(4), strict=True):
        (nn.functional.mse_loss(whole(one), target) / 4).backward()
    wanted = [p.grad for p in whole.parameters()]
    begin = {s: sum(len(list(p.parameters())) for p in pieces[:s]) for s in own}
    for s in own:
        for index, parameter in enumerate(pieces[s].parameters()):
            torch.testing.assert_close(parameter.grad, wanted[begin[s] + index])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [*SYNCHRONOUS, "interleaved"])
def test_torch_trains_by_our_schedules(tmp_path: Path, kind: str) -> None:
    on_ranks(tmp_path, 2, _train, kind, False)


@pytest.mark.distributed
def test_torch_trains_by_our_sends_and_receives(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _train, "1f1b", True)


def test_what_torch_cannot_run() -> None:
    stage = Described(2, 2)
    with pytest.raises(ArgumentError) as caught:
        torch_runtime(generate("no_flush", 2, 4), [stage])
    assert caught.value.message == "schedule 'no_flush' updates as it goes"
    with pytest.raises(ArgumentError) as caught:
        torch_runtime(generate("1f1b", 3, 4), [stage])
    assert caught.value.message == "the schedule has 3 stages and the model 2"
