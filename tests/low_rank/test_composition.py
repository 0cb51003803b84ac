"""`low_rank` in front of passes on the joint graph, alone and on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import graphopt
from graphopt.model.surface import report
from tests.low_rank.models import ANY, Mixer, batch
from tests.support.ranks import on_ranks


def _close(a: torch.Tensor, b: torch.Tensor, bound: float) -> None:
    assert float((a - b).detach().abs().max()) <= bound * float(b.detach().abs().max())


def test_precision_lowers_the_products_in_factors() -> None:
    plain, x = Mixer(), batch()
    spec = f"{ANY},cleanup,precision{{cost=roofline,policy=tf}}"
    model = graphopt.optimize(Mixer(), (x,), passes=spec, backend="eager", verify="eager")
    lowered = report(model).specialisations[0].steps[2].outcome
    assert lowered.applied
    _close(model(x), plain(x), 5e-2)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_kfac_sees_flat_factors_as_layers_of_their_own() -> None:
    x = batch()
    spec = f"{ANY},kfac{{damping=0.01}}"
    model = graphopt.optimize(Mixer(), (x,), passes=spec, backend="eager", verify="eager")
    curved = {site.site for site in report(model).specialisations[0].steps[1].outcome.applied}
    flat = [name for name, p in model.named_parameters() if ".left.original" in name]
    assert len(flat) == 2
    assert curved & set(flat) or any(name in site for site in curved for name in flat)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def _one(rank: int, folder: str) -> None:
    """Ranks begin with different weights and batches; all get rank 0's factors."""
    model = Mixer()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank * 0.01)
    spec = f"{ANY},group_gradients"
    x = batch(seed=rank)
    graphopt.optimize(model, (x,), passes=spec, backend="eager", verify="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others)
    assert any("original0" in name for name, _ in model.named_parameters())
    if rank == 0:
        torch.save(graphopt.dense_state_dict(model), Path(folder) / "dense.pt")


@pytest.mark.distributed
def test_two_ranks_are_one_with_both_batches(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _one, str(tmp_path))
    together = torch.load(tmp_path / "dense.pt")
    model = Mixer()
    x = torch.cat([batch(seed=0), batch(seed=1)])
    graphopt.optimize(model, (x,), passes=ANY, backend="eager", verify="off")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, value in graphopt.dense_state_dict(model).items():
        _close(together[name], value, 1e-5)
