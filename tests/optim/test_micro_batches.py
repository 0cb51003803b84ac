"""Steps of several micro-batches: gradients, norms, `no_sync`, optimized models, jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.errors import ArgumentError
from graphopt.grouping.noise_scale import NoiseScale
from graphopt.optim import BatchSchedule
from graphopt.optim.micro_batches import count_examples
from tests.support.ranks import on_ranks

Micro = tuple[Tensor, Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(sizes: list[int], seed: int = 1) -> list[Micro]:
    """Mostly of one class, so that the gradient stands out of its noise."""
    random = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 6, generator=random, dtype=torch.float64) for size in sizes]
    return [(x, (x[:, 0] > 1).long()) for x in inputs]


def whole_gradient(data: list[Micro]) -> Tensor:
    """The oracle: one batch."""
    model = network()
    inputs, targets = (torch.cat(part) for part in zip(*data, strict=True))
    F.cross_entropy(model(inputs), targets).backward()
    return flat(model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def accumulate(schedule: BatchSchedule, data: list[Micro]) -> None:
    """One epoch, gradients of its last step left in place."""
    model: Any = schedule.model
    for step in schedule.steps(data):
        model.zero_grad()
        for inputs, targets in step:
            step.backward(F.cross_entropy(model(inputs), targets))


def fixed(model: nn.Module, size: int) -> BatchSchedule:
    return BatchSchedule(model, smallest=size, largest=size, rounding="whole")


@pytest.mark.parametrize("sizes", [[8], [4, 4], [5, 3, 7], [4, 4, 4, 1]], ids=str)
@pytest.mark.parametrize("passes", [None, "cleanup", "auto"])
def test_the_gradient_is_that_of_one_batch(passes: str | None, sizes: list[int]) -> None:
    model, data = network(), batches(sizes)
    if passes is not None:
        model = graphopt.optimize(model, passes=passes, backend="eager")
    schedule = fixed(model, len(sizes))
    accumulate(schedule, data)
    torch.testing.assert_close(flat(model), whole_gradient(data), rtol=1e-12, atol=1e-14)
    assert schedule.steps_done == 1


def _noise_by_hand(data: list[Micro]) -> float | None:
    grads = torch.stack([whole_gradient([micro]) for micro in data])
    noise = NoiseScale()
    noise.update(
        float(grads.square().sum(1).mean()),
        float(grads.mean(0).square().sum()),
        len(grads),
        len(data[0][0]),
    )
    return noise.value


class Counting(nn.Sequential):
    """Says how often each forward was within `no_sync`."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.quiet, self.seen = False, list[bool]()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.quiet = True
        yield
        self.quiet = False

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(self.quiet)
        return super().forward(inputs)


def test_norms_are_those_of_single_gradients() -> None:
    data = batches([3] * 5)
    plain = fixed(network(), 5)
    accumulate(plain, data)
    assert plain.noise_scale == pytest.approx(_noise_by_hand(data), rel=1e-5)


def test_a_model_with_no_sync_is_told_the_last_one_and_measured_before() -> None:
    data, model = batches([3] * 5), Counting(*network())
    schedule = fixed(model, 5)
    accumulate(schedule, data)
    assert model.seen == [True] * 4 + [False]
    assert schedule.noise_scale == pytest.approx(_noise_by_hand(data[:4]), rel=1e-5)


def test_natural_gradients_do_not_enter_the_noise() -> None:
    """What K-FAC leaves in the end is preconditioned; the micro-batches before are not."""
    data = batches([4] * 4)
    model = graphopt.optimize(network().float(), passes="kfac{damping=0.1}", backend="eager")
    schedule = BatchSchedule(model, smallest=4, largest=4)
    accumulate(schedule, [(inputs.float(), targets) for inputs, targets in data])
    assert schedule.noise_scale == pytest.approx(_noise_by_hand(data[:3]), rel=1e-3)
    plain = whole_gradient(data).float()
    assert not torch.allclose(flat(model), plain, rtol=0.1)


def test_a_model_with_no_sync_needs_one_more() -> None:
    model = Counting(*network())
    assert BatchSchedule(model).smallest == 4
    assert BatchSchedule(model, rounding="whole").smallest == 3
    with pytest.raises(ArgumentError, match="takes 3 micro-batches"):
        BatchSchedule(model, smallest=2)
    assert BatchSchedule(model, smallest=1, noise=lambda: None).smallest == 1


def test_micro_batches_of_different_sizes_are_not_measured() -> None:
    schedule = fixed(network(), 3)
    accumulate(schedule, batches([4, 4, 2]))
    assert schedule.noise_scale is None


def test_frozen_and_unused_parameters() -> None:
    model, data = network(), batches([3] * 4)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    schedule = fixed(model, 4)
    accumulate(schedule, data)
    assert schedule.noise_scale == pytest.approx(_noise_by_hand(data), rel=1e-5)


def test_a_scale_of_the_loss_cancels() -> None:
    """As a gradient scaler has it."""
    data, model = batches([3] * 4), network()
    schedule = fixed(model, 4)
    for step in schedule.steps(data):
        for inputs, targets in step:
            step.backward(1024 * F.cross_entropy(model(inputs), targets))
    assert schedule.noise_scale == pytest.approx(_noise_by_hand(data), rel=1e-5)


def test_gradients_that_are_not_finite_leave_the_noise_as_it_was() -> None:
    data, model = batches([3] * 4), network()
    schedule = fixed(model, 4)
    accumulate(schedule, data)
    before = schedule.noise_scale
    data[1][0][0, 0] = torch.nan
    accumulate(schedule, data)
    assert schedule.noise_scale == before


# -- a loop that is wrong --------------------------------------------------------------------------


def test_a_backward_of_the_loss_alone_is_noticed() -> None:
    model = network()
    micro_batches = iter(next(fixed(model, 2).steps(batches([2, 2]))))
    inputs, targets = next(micro_batches)
    F.cross_entropy(model(inputs), targets).backward()
    with pytest.raises(ArgumentError, match="micro-batch 1 of 2 had no backward") as caught:
        next(micro_batches)
    assert "step.backward(loss)" in caught.value.hint


def test_a_second_backward_is_refused() -> None:
    model = network()
    step = next(fixed(model, 1).steps(batches([2])))
    for inputs, targets in step:
        step.backward(F.cross_entropy(model(inputs), targets))
        with pytest.raises(ArgumentError, match="no micro-batch whose backward is due"):
            step.backward(F.cross_entropy(model(inputs), targets))
        break


def test_a_step_that_is_left_early_is_refused() -> None:
    model = network()
    steps = fixed(model, 2).steps(batches([2] * 4))
    step = next(steps)
    for inputs, targets in step:
        step.backward(F.cross_entropy(model(inputs), targets))
        break
    with pytest.raises(ArgumentError, match="was not gone through to its end"):
        next(steps)


def test_a_step_is_gone_through_once() -> None:
    model = network()
    for step in fixed(model, 1).steps(batches([2])):
        for inputs, targets in step:
            step.backward(F.cross_entropy(model(inputs), targets))
        with pytest.raises(ArgumentError, match="twice"):
            list(step)


def test_sparse_gradients_cannot_be_measured() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    step = next(fixed(table, 2).steps([torch.tensor([0, 1]), torch.tensor([2, 3])]))
    loss = table(next(iter(step))).square().mean()
    with pytest.raises(ArgumentError, match="sparse") as caught:
        step.backward(loss)
    assert "double_every" in caught.value.hint


def test_examples_are_counted_in_any_structure() -> None:
    ids = torch.zeros(3, 5)
    assert count_examples({"scale": torch.tensor(1.0), "ids": ids}) == 3
    assert count_examples([("name", ids)]) == 3
    assert count_examples(ids) == 3
    for bad in (7, ["text"], torch.tensor(1.0)):
        with pytest.raises(ArgumentError, match="holds no tensor"):
            count_examples(bad)
    with pytest.raises(ArgumentError, match="empty"):
        count_examples(torch.zeros(0, 5))


# -- jobs ------------------------------------------------------------------------------------------


def _job(rank: int, kind: str) -> None:
    data = [batches([3] * 4, seed=10 + r) for r in range(2)]
    model: Any = network()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        model = graphopt.optimize(model, backend="eager")
    schedule = BatchSchedule(model, smallest=4, largest=4)
    accumulate(schedule, data[rank])
    torch.testing.assert_close(
        flat(model), whole_gradient(data[0] + data[1]), rtol=1e-11, atol=1e-13
    )
    noise = NoiseScale()
    grads = [torch.stack([whole_gradient([m]) for m in own[:3]]) for own in data]
    local = sum(float(g.square().sum(1).mean()) for g in grads) / 2
    whole = sum(float(g.mean(0).square().sum()) for g in grads) / 2
    noise.update(local, whole, 3, 3)
    assert schedule.noise_scale == pytest.approx(noise.value, rel=1e-5)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, schedule.noise_scale)
    assert everywhere[0] == everywhere[1]
    # Sizes that differ on one rank: no rank measures, and none waits.
    uneven = batches([3, 3, 3, 3 - rank], seed=20 + rank)
    accumulate(schedule, uneven)
    assert schedule.noise_scale == everywhere[0]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "graphopt"])
def test_a_job_accumulates_and_measures_alike_on_all_ranks(kind: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _job, kind)


def _driven(rank: int) -> None:
    model: Any = graphopt.optimize(network(), backend="eager")
    schedule = BatchSchedule(model, smallest=1, largest=8, noise=model.noise_scale, hold=1)
    random = torch.Generator().manual_seed(rank)
    data = [
        (x, torch.randint(3, y.shape, generator=random) % 2)
        for x, y in batches([1] * 400, seed=30 + rank)
    ]
    accumulate(schedule, data)
    assert schedule.changes
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, [str(change) for change in schedule.changes])
    assert everywhere[0] == everywhere[1]
    # In examples over both ranks: two micro-batches of one are four.
    first = schedule.changes[0]
    scale = float(first.reason.split()[2])
    assert first.after <= max(1.0, scale / 2)


@pytest.mark.distributed
def test_the_noise_scale_of_a_job_drives_it(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _driven)
