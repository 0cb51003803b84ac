"""Narrow wires, results of the step before, and the gradient noise scale, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import graphopt
from tests.support.models import batch, mlp
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _mean_gradients(steps: int, world: int) -> list[list[torch.Tensor]]:
    """The oracle: one process, plain PyTorch, gradients averaged by hand."""
    model = mlp()
    found = []
    for step in range(steps):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(world):
            model.zero_grad()
            model(batch("mlp", 10 * step + rank)).square().mean().backward()
            for total, parameter in zip(sums, model.parameters(), strict=True):
                total += parameter.grad / world
        found.append(sums)
    return found


def _gradients(model: Any, rank: int, steps: int) -> list[list[torch.Tensor]]:
    found = []
    for step in range(steps):
        model.zero_grad()
        model(batch("mlp", 10 * step + rank)).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    return found


def _late(rank: int, mode: str) -> None:
    model = graphopt.optimize(mlp(), passes=f"group_gradients{{stale={mode}}}", backend="eager")
    actual, expected = _gradients(model, rank, 4), _mean_gradients(4, 2)
    assert all(not g.any() for g in actual[0])
    for late, fresh in zip(actual[1:], expected, strict=False):
        torch.testing.assert_close(late, fresh, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["double_buffer", "lag"])
def test_results_of_the_step_before(mode: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _late, mode)


def _narrow(rank: int, wire: str, tolerance: float, backend: str) -> None:
    model = graphopt.optimize(mlp(), passes=f"group_gradients{{wire={wire}}}", backend=backend)
    for actual, expected in zip(_gradients(model, rank, 2), _mean_gradients(2, 2), strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype is torch.float32
            assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("wire", "tolerance"), [("bf16", 2**-6), ("int32", 1e-6)])
def test_narrow_wires(wire: str, tolerance: float, backend: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _narrow, wire, tolerance, backend)


def _noise(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager")
    assert model.noise_scale() is None
    _gradients(model, rank, 1)
    grads = []
    for other in range(2):
        plain = mlp()
        plain(batch("mlp", other)).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in plain.parameters()]).double())
    local = float(sum(g.square().sum() for g in grads)) / 2
    reduced = float((sum(grads) / 2).square().sum())
    # McCandlish et al., appendix A.1, for two batches of six.
    signal, noise = 2 * reduced - local, 2 * 6 * (local - reduced)
    assert model.noise_scale() == pytest.approx(noise / signal, rel=1e-4)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, model.noise_scale())
    assert everywhere[0] == everywhere[1]


def test_noise_scale(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _noise)


def _noise_of_micro_batches(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), passes="group_gradients", backend="eager")
    with model.no_sync():
        (model(batch("mlp", rank)).square().mean() / 2).backward()
    (model(batch("mlp", 10 + rank)).square().mean() / 2).backward()
    grads = []
    for other in range(2):
        plain = mlp()
        for micro in (other, 10 + other):
            (plain(batch("mlp", micro)).square().mean() / 2).backward()
        grads.append(torch.cat([p.grad.flatten() for p in plain.parameters()]).double())
    local = float(sum(g.square().sum() for g in grads)) / 2
    reduced = float((sum(grads) / 2).square().sum())
    signal, noise = 2 * reduced - local, 2 * 12 * (local - reduced)  # two batches of twelve
    assert model.noise_scale() == pytest.approx(noise / signal, rel=1e-4)


def test_the_noise_scale_counts_the_examples_of_all_micro_batches(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _noise_of_micro_batches)


def _shapes_of_one_rank_only(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager")
    sizes = [(6, 6), (4, 6), (6, 2)]
    for step, pair in enumerate(sizes):
        model.zero_grad()
        model(batch("mlp", 10 * step + rank)[: pair[rank]]).square().mean().backward()
    expected = []
    for other in range(2):
        plain = mlp()
        plain(batch("mlp", 20 + other)[: sizes[2][other]]).square().mean().backward()
        expected.append([p.grad for p in plain.parameters()])
    for p, a, b in zip(model.parameters(), *expected, strict=True):
        torch.testing.assert_close(p.grad, (a + b) / 2, rtol=1e-5, atol=1e-7)


def test_a_rank_may_see_other_shapes(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _shapes_of_one_rank_only, timeout=20)
