"""Ranks per mesh dimension: from a mesh, a process group, or the whole world."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import graphopt
from graphopt.errors import ArgumentError
from graphopt.model.controller import controller_of
from tests.support.ranks import on_ranks


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def _gradient(model: Any, number: int) -> torch.Tensor:
    torch.manual_seed(number)
    model.zero_grad()
    model(torch.randn(6, 4)).square().mean().backward()
    return torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])


def _two_by_two(rank: int) -> None:
    """Gradients are averaged along ``dp`` only, whatever the other dimension is for."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    partners = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}[rank]
    model = graphopt.optimize(_model(), mesh=mesh, backend="eager")
    expected = sum(_gradient(_model(), other) for other in partners) / 2
    torch.testing.assert_close(_gradient(model, rank), expected, rtol=1e-5, atol=1e-7)
    session = controller_of(model).session  # type: ignore[union-attr]
    assert session.ranks["dp"].size == 2
    assert set(session.ranks) == {"dp"}  # no pass of this pipeline sends anything along pp
    for name in ("dp", "pp"):  # they wait as long as the job does, and not torch's half an hour
        backend = mesh.get_group(name)._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=60)
    patient = dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=90))
    graphopt.optimize(_model(), mesh=patient, backend="eager")
    own = patient._get_backend(torch.device("cpu"))
    assert own.options._timeout == timedelta(seconds=90)

    group = mesh.get_group("dp")
    other = graphopt.optimize(_model(), mesh=group, backend="eager")
    torch.testing.assert_close(_gradient(other, rank), expected, rtol=1e-5, atol=1e-7)

    whole = graphopt.optimize(_model(), backend="eager")
    mean = sum(_gradient(_model(), other) for other in range(4)) / 4
    torch.testing.assert_close(_gradient(whole, rank), mean, rtol=1e-5, atol=1e-7)


@pytest.mark.distributed
def test_ranks_along_one_dimension(tmp_path: Path) -> None:
    on_ranks(tmp_path, 4, _two_by_two, timeout=60)


def _refused(rank: int) -> None:
    with pytest.raises(ArgumentError, match="mesh says dp=3, and this job has 2 ranks"):
        graphopt.optimize(_model(), mesh="dp=3")
    with pytest.raises(ArgumentError, match="dimensions of this DeviceMesh have no names"):
        graphopt.optimize(_model(), mesh=init_device_mesh("cpu", (2,)))
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ArgumentError, match="rank 1 is not in the process group"):
            graphopt.optimize(_model(), mesh=alone)
    model = _model()
    assert type(model) is nn.Sequential


@pytest.mark.distributed
def test_a_mesh_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _refused, timeout=60)


def test_a_mesh_is_a_text_a_dict_or_something_of_a_running_job() -> None:
    with pytest.raises(ArgumentError, match="mesh=4 is no text, dict, DeviceMesh or process group"):
        graphopt.optimize(_model(), mesh=4)


@pytest.mark.parametrize(
    "mesh", [{"dp": 2.7}, {"dp": True}, "dp=2,dp=4", "=8", {"dp": float("inf")}]
)
def test_sizes_that_are_none_and_names_that_are_missing_or_doubled(mesh: Any) -> None:
    with pytest.raises(ArgumentError, match="mesh"):
        graphopt.optimize(_model(), mesh=mesh)


def test_a_dry_run_plans_for_ranks_that_are_not_there() -> None:
    plan = graphopt.optimize(_model(), (torch.randn(6, 4),), mesh="dp=8", dry_run=True)
    assert [part.name for part in plan.parts] == ["group_gradients"]  # type: ignore[union-attr]
