"""Stock schedules of ``torch.distributed.pipelining`` train across any cut, with our relays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    pipeline,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from graphopt.partitioning.from_exported import ExportedProblem
from graphopt.partitioning.torch_split import split_at, split_policy
from graphopt.testing.corpus import CORPUS
from tests.support.ranks import in_processes, on_ranks

Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]

MICRO_BATCHES = 4
STAGES = 4
SINGLE = (ScheduleGPipe, Schedule1F1B)
SEVERAL = (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble)


class UNet(nn.Module):
    """Two skips over the bottom, and a value that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.bottom = nn.Conv2d(6, 6, 3, padding=1)
        self.up, self.last = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        outer = torch.tanh(self.first(x))
        inner = F.elu(self.down(F.max_pool2d(outer, 2)))
        h = F.max_pool2d(F.elu(self.bottom(inner)), 2)
        h = F.elu(self.up(torch.cat([inner, F.interpolate(h, scale_factor=2.0)], 1)))
        h = torch.cat([outer, F.interpolate(h, scale_factor=2.0)], 1)
        return self.last(self.mix(h).transpose(2, 3))


class Scaled(UNet):
    """An input that is read first and last."""

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x / scale) * scale


def _scaled() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Scaled()
    return model, (1 + torch.rand(8, 1, 1, 1), torch.randn(8, 2, 8, 8))


def _resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, _, _ = CORPUS["resnet"].make()
    torch.manual_seed(1)
    return model, (torch.randn(8, 3, 16, 16),)


def _skipping(module: fx.GraphModule) -> dict[fx.Node, int]:
    """The outer skip has two readers, and a convolution reads the inner one where it is made."""
    exported = ExportedProblem(module)
    names = [operator.name for operator in exported.problem.operators]
    ends = [names.index(name) for name in ("tanh", "elu_1", "elu_2")]
    places = {name: sum(i > end for end in ends) for i, name in enumerate(names)}
    return exported.stages(places)


def _with_relays(module: fx.GraphModule) -> fx.GraphModule:
    split_at(module, _skipping(module))
    return module


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _wanted(make: Make) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Target, gradients and output of the whole model, micro-batch by micro-batch."""
    model, inputs = make()
    outputs = []
    target = None
    for batch in zip(*(x.chunk(MICRO_BATCHES) for x in inputs), strict=True):
        output = model(*batch)
        target = torch.full_like(output, 0.3)
        (_loss(output, target) / MICRO_BATCHES).backward()
        outputs.append(output.detach())
    whole = torch.cat(outputs)
    return (
        torch.full_like(whole, 0.3),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        whole,
    )


def _train(rank: int, world: int, makes: Sequence[Make]) -> None:
    for make in makes:
        target, wanted, whole = _wanted(make)
        for kinds, per_rank in ((SINGLE, 1), (SEVERAL, 2)):
            model, inputs = make()
            example = tuple(x[: len(x) // MICRO_BATCHES] for x in inputs)
            skips = make is _scaled and per_rank * world == STAGES
            policy = _with_relays if skips else split_policy(per_rank * world)
            pipe = pipeline(model, example, split_policy=policy)
            numbers = range(rank, per_rank * world, world)
            stages = [pipe.build_stage(n, torch.device("cpu")) for n in numbers]
            for kind in kinds:
                given = stages[0] if per_rank == 1 else stages
                schedule = kind(given, MICRO_BATCHES, loss_fn=_loss)
                last = rank == world - 1
                output = schedule.step(
                    *inputs if rank == 0 else (), target=target if last else None
                )
                if last:
                    torch.testing.assert_close(output, whole)
                for parameter, gradient in _take_gradients(stages):
                    torch.testing.assert_close(
                        gradient, wanted[parameter], msg=f"{kind} {parameter}"
                    )


def _take_gradients(stages: Sequence[Any]) -> Iterator[tuple[str, Tensor | None]]:
    for stage in stages:
        for name, parameter in stage.submod.named_parameters():
            yield name, parameter.grad
            parameter.grad = None


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "makes"), [(2, [_scaled, _resnet]), (4, [_scaled])])
def test_stock_schedules_train(tmp_path: Path, world: int, makes: Sequence[Make]) -> None:
    on_ranks(tmp_path, world, _train, world, makes)


# -- without relays --------------------------------------------------------------------------------


def _cut_only(module: fx.GraphModule) -> fx.GraphModule:
    """The same stages, and nothing passed on."""
    stage, graph = _skipping(module), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in sorted(module.graph.nodes, key=lambda n: _place(n, stage)):
        if node.op == "call_function" and stage[node] > _marks(graph):
            graph.call_function(torch.ops.pippy._pipe_split.default)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.set_codegen(module.graph._codegen)
    module.graph = graph
    return module


def _place(node: fx.Node, stage: dict[fx.Node, int]) -> int:
    if node.op in ("placeholder", "get_attr"):
        return -1
    return stage.get(node, STAGES)


def _marks(graph: fx.Graph) -> int:
    return sum(n.target is torch.ops.pippy._pipe_split.default for n in graph.nodes)


def _first_rank(_: int) -> None:
    """Torch refuses before it sends anything, so that one rank of a made-up group is enough."""
    x = torch.randn(2 * MICRO_BATCHES, 2, 8, 8)
    for kind in (*SINGLE, *SEVERAL):
        world = STAGES if kind in SINGLE else STAGES // 2
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        pipe = pipeline(UNet(), (x[:2],), split_policy=_cut_only)
        assert pipe.num_stages == STAGES
        stages = [pipe.build_stage(n, torch.device("cpu")) for n in range(0, STAGES, world)]
        schedule = kind(stages if kind in SEVERAL else stages[0], MICRO_BATCHES, loss_fn=_loss)
        with pytest.raises(RuntimeError, match="Backward of skip connections not supported"):
            schedule.step(x)
        dist.destroy_process_group()


def test_torch_refuses_the_same_stages() -> None:
    """If this fails, torch has learnt to train across skips."""
    in_processes(1, _first_rank)
