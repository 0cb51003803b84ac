"""Pipelined backpropagation on ranks, against training with delays in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError, SpecError
from graphopt.model.surface import report
from graphopt.optim import DelayedSGD, pipelined_delay
from graphopt.plan.partition import Stages
from graphopt.study.pipelined import PipelinedBackpropagation
from tests.support.ranks import on_ranks

STEPS, MICRO_BATCHES = 3, 4


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise([6, 16, 16, 16, 16, 16])),
        nn.Linear(16, 3),
    )


def _batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    sizes = [2 * MICRO_BATCHES] * STEPS
    return [(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in sizes]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3)


def _compensated(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return DelayedSGD(parameters, 0.05, momentum=0.9, **options)


def _predicting(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return _compensated(parameters, prediction="velocity", **options)


Make = Callable[..., torch.optim.Optimizer]
CASES: tuple[tuple[str, int, Make], ...] = (
    ("stash", 1, _sgd),
    ("stash", 1, _compensated),
    ("stash", 2, _sgd),
    ("stash", 8, _sgd),  # the drain ends an update of four micro-batches
    ("inconsistent", 1, _sgd),
    ("predicted", 1, _predicting),
)


def _stages_of(net: nn.Sequential, part: Stages) -> list[nn.Sequential]:
    """The modules of a plan's stages, which are layers of the net as a whole."""
    owner = {n.split(".")[0]: i for i, s in enumerate(part.stages) for n in s.parameters}
    found: list[list[nn.Module]] = [[] for _ in part.stages]
    for name, child in net.named_children():
        found[owner[name]].append(child)
    return [nn.Sequential(*children) for children in found]


def _study(part: Stages, weights: str, every: int, make: Make) -> dict[str, Tensor]:
    net = _net()
    stages = _stages_of(net, part)
    if make is _sgd:
        optimizer = make(net.parameters())
    else:
        groups = [
            {"params": list(s.parameters()), "delay": pipelined_delay(i, len(stages))}
            for i, s in enumerate(stages)
        ]
        optimizer = make(groups, rebind=weights == "stash")
    study = PipelinedBackpropagation(
        stages,
        optimizer,
        nn.functional.cross_entropy,
        [pipelined_delay(i, len(stages)) for i in range(len(stages))],
        weights="stash" if weights == "stash" else "inconsistent",
        accumulate=every,
    )
    for x, y in _batches():
        for inputs, target in zip(x.split(2), y.split(2), strict=True):
            study.step(inputs, target)
    study.drain()
    return {n: t.clone() for n, t in net.state_dict().items()}


def _ranks(rank: int, world: int) -> None:
    for weights, every, make in CASES:
        net = _net()
        optimizer = make(net.parameters())
        spec = f"partition{{schedule=no_flush,microbatches={MICRO_BATCHES},weights={weights},"
        model = graphopt.optimize(
            net,
            passes=f"{spec}accumulate={every}}}",
            mesh={"pp": world},
            loss=nn.functional.cross_entropy,
            optimizer=optimizer,
        )
        losses = [model.step(*batch) for batch in _batches()]
        assert losses[-1] is not None
        found = model.state_dict()
        part = report(model).specialisations[0].plan.part(Stages)
        expected = _study(part, weights, every, make)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (weights, every, make.__name__, name)
        # A drained pipeline starts anew.
        model.step(*_batches()[0])
        model.state_dict()


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one_process_with_delays(tmp_path: Path, world: int) -> None:
    on_ranks(tmp_path, world, _ranks, world)


def _refused(rank: int) -> None:
    for weights, make, reason in (
        ("stash", None, "has no optimizer"),
        ("stash", lambda p: torch.optim.SGD(p, 0.1, fused=True), "fused"),
        ("predicted", _sgd, "SGD does not"),
    ):
        net = _net()
        before = copy.deepcopy(net.state_dict())
        model = graphopt.optimize(
            net,
            passes=f"partition{{schedule=no_flush,weights={weights}}}",
            mesh="pp=2",
            loss=nn.functional.cross_entropy,
            optimizer=make,
        )
        with pytest.raises(ArgumentError, match=reason):
            model.step(*_batches()[0])
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    # The optimizer is told how late it is.
    net = _net()
    model = graphopt.optimize(
        net,
        passes="partition{schedule=no_flush,weights=predicted,microbatches=2}",
        mesh="pp=2",
        loss=nn.functional.cross_entropy,
        optimizer=(optimizer := DelayedSGD(net.parameters(), 0.1, prediction="velocity")),
    )
    model.step(*_batches()[0])
    assert optimizer.param_groups[0]["delay"] == 2 * (1 - rank)
    assert model.step(*_batches()[1]) is not None
    model.state_dict()  # nobody leaves while another rank waits for what it has sent


@pytest.mark.distributed
def test_optimizers_that_would_be_wrong_are_refused(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _refused)


def test_one_process_has_no_stream() -> None:
    model = graphopt.optimize(
        _net(),
        passes="partition{stages=2,schedule=no_flush}",
        loss=nn.functional.cross_entropy,
        optimizer=_sgd,
    )
    with pytest.raises(ArgumentError, match="needs ranks"):
        model.step(*_batches()[0])


@pytest.mark.parametrize("option", ["weights=inconsistent", "accumulate=2"])
def test_options_of_streams_only(option: str) -> None:
    with pytest.raises(SpecError, match="never drained"):
        graphopt.optimize(_net(), passes=f"partition{{stages=2,{option}}}")
