"""``wire=int32``: the same bits for every number of ranks and every grouping."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.grouping.baselines import one_group, per_layer
from graphopt.passes import group_gradients
from tests.support.models import batch, mlp
from tests.support.ranks import on_ranks

MICRO_BATCHES = 4
STEPS = 10


def _train(model: Any, module: Any, rank: int, world: int) -> str:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    mine = range(rank, MICRO_BATCHES, world)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index, micro in enumerate(mine):
            last = index == len(mine) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = model(batch("mlp", MICRO_BATCHES * step + micro)).square().mean()
                (loss / len(mine)).backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()


def _exact(rank: int, world: int, folder: str, layout: str) -> None:
    if layout != "planned":
        layouts = {"one": one_group, "layers": per_layer}
        planned = group_gradients.plan

        def plan(ready: Any, cost: Any, backward: float, **about: Any) -> Any:
            from dataclasses import replace

            return replace(
                planned(ready, cost, backward, **about), groups=tuple(layouts[layout](ready))
            )

        group_gradients.plan = plan
    model = graphopt.optimize(mlp(), passes="cleanup,group_gradients{wire=int32}", backend="eager")
    digest = _train(model, model, rank, world)
    Path(folder, f"{world}-{layout}-{rank}").write_text(digest)


def _ddp(rank: int, world: int, folder: str) -> None:
    module = mlp()
    digest = _train(DistributedDataParallel(module), module, rank, world)
    Path(folder, f"ddp{world}-{rank}").write_text(digest)


def _digests(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.distributed
def test_bits_do_not_depend_on_world_size_or_layout(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for world in (2, 4):
        on_ranks(tmp_path, world, _exact, world, str(results), "planned")
    for layout in ("one", "layers"):
        on_ranks(tmp_path, 2, _exact, 2, str(results), layout)
    on_ranks(tmp_path, 1, _exact, 1, str(results), "planned")
    assert len(list(results.iterdir())) == 2 + 4 + 2 + 2 + 1
    assert len(_digests(results)) == 1


@pytest.mark.distributed
def test_ddp_in_float32_depends_on_world_size(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for world in (1, 2, 4):
        on_ranks(tmp_path, world, _ddp, world, str(results))
    assert len(_digests(results)) > 1


def test_int32_and_stale_cannot_be_combined() -> None:
    from graphopt.errors import ArgumentError

    with pytest.raises(ArgumentError, match="cannot be combined"):
        group_gradients.GroupGradients(wire="int32", stale="lag")
