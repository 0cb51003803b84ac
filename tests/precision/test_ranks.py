"""In a job of two ranks: one choice for all, reduced gradients, and steps that all leave out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphopt
from tests.support.ranks import on_ranks

LOW = "precision{cost=roofline,policy=tf}"
SCALED = "precision{cost=roofline,policy=tf,format=fp16}"
SPECS = (
    f"cleanup,{LOW},schedule,group_gradients",
    "cleanup,precision,group_gradients",
    f"cleanup,{SCALED},group_gradients",
    f"cleanup,{SCALED},group_gradients{{wire=int32}}",
    f"cleanup,{SCALED},group_gradients{{wire=bf16}}",
)


def _model(spec: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return plain, graphopt.optimize(copy.deepcopy(plain), passes=spec, backend="eager")


def _same_everywhere(tensor: Tensor) -> None:
    both = [torch.zeros_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    assert torch.equal(*both)


def _trains(rank: int) -> None:
    for spec in SPECS:
        plain, model = _model(spec)
        exact = plain.double()
        batches = torch.randn(2, 2, 8, 16)
        with model.no_sync():
            (model(batches[0, rank]).square().mean() / 2).backward()
        (model(batches[1, rank]).square().mean() / 2).backward()
        for batch in batches.flatten(0, 1):
            (exact(batch.double()).square().mean() / 4).backward()
        for ours, wanted in zip(model.parameters(), exact.parameters(), strict=True):
            assert ours.grad is not None
            _same_everywhere(ours.grad)
            bound = 0.01 if "fp16" in spec and "bf16" not in spec else 0.06
            error = (ours.grad - wanted.grad).abs().max() / wanted.grad.abs().max()
            assert error <= bound, (spec, error)
        assert "aten.addmm.default" in model.explain()


@pytest.mark.distributed
def test_gradients_of_two_ranks(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _trains)


SKIPPING = (
    f"cleanup,{SCALED},group_gradients",
    f"cleanup,{SCALED},group_gradients{{wire=int32}}",
    f"cleanup,kfac{{damping=0.1}},{SCALED}",
    f"cleanup,kfac{{damping=0.1}},{SCALED},group_gradients",
    f"cleanup,{SCALED}",
)


def _skips(rank: int) -> None:
    for spec in SKIPPING:
        _, model = _model(spec)
        good = torch.randn(8, 16)
        model(good).square().mean().backward()
        # The micro-batch of one rank overflows, then the last batch of the other one.
        for bad in (0, 1):
            model.zero_grad()
            with model.no_sync():
                x = good * 1e30 if (rank, bad) == (0, 0) else good
                model(x).square().mean().backward()
            x = good * 1e30 if (rank, bad) == (1, 1) else good
            model(x).square().mean().backward()
            assert all(p.grad is None for p in model.parameters()), spec
        state = graphopt.state_dict(model)
        assert state["precision/skipped"] == 2, spec
        assert state["precision/scale"] == 2.0**14, spec
        model(good).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), spec


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*finite")
def test_all_ranks_leave_a_step_out_or_none(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _skips)


RESUMED = (
    f"cleanup,kfac{{damping=0.1}},{LOW}",
    f"cleanup,{LOW},schedule,group_gradients",
    f"cleanup,kfac{{damping=0.1}},{SCALED},group_gradients",
)


def _resumes(rank: int) -> None:
    for spec in RESUMED:
        _, model = _model(spec)
        batches = torch.randn(4, 2, 8, 16)

        def train(net: nn.Module, steps: Tensor) -> None:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            for batch in steps:
                optimizer.zero_grad()
                net(batch[rank]).square().mean().backward()
                optimizer.step()

        train(model, batches[:2])
        weights, state = copy.deepcopy(model.state_dict()), graphopt.state_dict(model)
        _, other = _model(spec)
        other.load_state_dict(weights)
        graphopt.load_state_dict(other, state)
        for net in (model, other):
            train(net, batches[2:])
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), spec
            _same_everywhere(a.detach())
        after = graphopt.state_dict(other)
        for key, value in graphopt.state_dict(model).items():
            assert torch.equal(value, after[key]), (spec, key)


@pytest.mark.distributed
def test_resuming_two_ranks_is_bit_equal(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _resumes)
