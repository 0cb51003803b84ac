"""`low_rank` on two ranks: gradients in groups, stages, and what an optimizer may be."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError
from tests.low_rank.models import ANY, Mixer, batch
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _close(a: Tensor, b: Tensor, bound: float) -> None:
    assert float((a - b).detach().abs().max()) <= bound * float(b.detach().abs().max())


LOWERED = "precision{format=bf16,cost=roofline,policy=tf}"
# Behind `low_rank`, and how far updates may be from those of one process.
SPECS = {
    "cleanup,schedule": 1e-4,
    f"kfac{{damping=0.02,interval=1}},{LOWERED}": 0.1,
}


def _train(spec: str, pieces: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Two steps, each of these micro-batches: what the weights have changed by."""
    graphopt.optimize(model, (pieces[0],), passes=spec, backend="eager", verify="off")
    before = graphopt.dense_state_dict(model)
    optimizer = _sgd(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        for piece in pieces:
            last = piece is pieces[-1] or not hasattr(model, "no_sync")
            with nullcontext() if last else model.no_sync():
                (model(piece).square().mean() / len(pieces)).backward()
        optimizer.step()
    return {k: v - before[k] for k, v in graphopt.dense_state_dict(model).items()}


def _grouped(rank: int, folder: str) -> None:
    """Ranks begin with different weights and batches; all get rank 0's factors."""
    for number, spec in enumerate(SPECS):
        model = Mixer()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(rank * 0.01)
        pieces = [batch(seed=2 * rank + i)[:2] for i in range(2)]
        moved = _train(f"{ANY},{spec},group_gradients", pieces, model)
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(others, mine)
        assert all(torch.equal(mine, other) for other in others), spec
        assert any("original0" in name for name, _ in model.named_parameters())
        if rank == 0:
            torch.save(moved, Path(folder) / f"{number}.pt")


def test_two_ranks_are_one_with_all_micro_batches(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _grouped, str(tmp_path))
    pieces = [batch(seed=seed)[:2] for seed in range(4)]
    for number, (spec, bound) in enumerate(SPECS.items()):
        together = torch.load(tmp_path / f"{number}.pt")
        for name, value in _train(f"{ANY},{spec}", pieces, Mixer()).items():
            _close(together[name], value, bound)


# -- stages ----------------------------------------------------------------------------------------


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _stages(rank: int, folder: str) -> None:
    """Weights that stages share out are replaced on all ranks; the optimizer is made of factors."""
    x = torch.cat([batch(), batch(seed=1)])[:4]
    options: dict[str, Any] = {"mesh": "pp=2", "loss": _loss, "backend": "eager", "verify": "off"}
    spec = f"{ANY},partition{{microbatches=2}}"
    model: Any = Mixer()
    before = dict(model.named_parameters())
    with pytest.raises(ArgumentError, match=r"made before and holds 'convolve'") as told:
        graphopt.optimize(model, (x,), passes=spec, optimizer=_sgd(model.parameters()), **options)
    assert "optimizer=lambda parameters" in told.value.hint
    assert all(p is before[name] for name, p in model.named_parameters())
    graphopt.optimize(model, (x,), passes=spec, optimizer=_sgd, **options)
    for _ in range(2):
        model.step(x, torch.zeros_like(x))
    saved = graphopt.dense_state_dict(model)
    if rank == 0:
        torch.save(saved, Path(folder) / "stages.pt")


def test_stages_of_a_model_in_factors(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _stages, str(tmp_path))
    x = torch.cat([batch(), batch(seed=1)])[:4]
    model = Mixer()
    graphopt.optimize(model, (x,), passes=ANY, backend="eager", verify="off")
    optimizer = _sgd(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        for piece in x.chunk(2):
            (_loss(model(piece), torch.zeros_like(piece)) / 2).backward()
        optimizer.step()
    together = torch.load(tmp_path / "stages.pt")
    for name, value in graphopt.dense_state_dict(model).items():
        _close(together[name], value, 1e-5)
