"""The learning rate of large batches: by the batch, and in four stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import ArgumentError
from graphopt.optim import SlowStart, linear_scaling, slow_start


def test_the_learning_rate_is_in_proportion_to_the_batch() -> None:
    assert linear_scaling(256) == 0.1
    assert linear_scaling(1024 * 32) == pytest.approx(12.8)
    assert linear_scaling(32, rate=0.4, reference=64) == pytest.approx(0.2)


def test_stages_of_ninety_epochs() -> None:
    factors = [slow_start(epoch) for epoch in range(90)]
    assert factors == [0.5] * 40 + [0.075] * 30 + [0.01] * 15 + [0.001] * 5
    assert slow_start(90.0) == slow_start(1000.0) == 0.001


@pytest.mark.parametrize("epochs", [9, 18.0, 45, 1])
def test_stages_of_any_length(epochs: float) -> None:
    for i in range(90):
        assert slow_start((i + 0.5) / 90 * epochs, epochs) == slow_start(i + 0.5)


def test_a_scheduler_sets_it_and_can_be_resumed() -> None:
    def rates(resume: bool) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
        scheduler = SlowStart(optimizer, steps_per_epoch=2, epochs=9)
        found = []
        for step in range(20):
            if resume and step == 9:
                saved: Any = optimizer.state_dict(), scheduler.state_dict()
                optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
                scheduler = SlowStart(optimizer, steps_per_epoch=2, epochs=9)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    expected = [1.0] * 8 + [0.15] * 6 + [0.02] * 3 + [0.002] * 3
    assert rates(False) == pytest.approx(expected)
    assert rates(True) == rates(False)


@pytest.mark.parametrize(
    "call",
    [
        lambda: linear_scaling(0),
        lambda: linear_scaling(32, reference=0),
        lambda: linear_scaling(32, rate=math.nan),
        lambda: linear_scaling(32, rate=-0.1),
        lambda: slow_start(-1.0),
        lambda: slow_start(1.0, 0.0),
        lambda: slow_start(math.nan),
        lambda: SlowStart(torch.optim.SGD([torch.ones(1)], 0.1), steps_per_epoch=0),
        lambda: SlowStart(torch.optim.SGD([torch.ones(1)], 0.1), steps_per_epoch=1, epochs=-3),
    ],
)
def test_bad_numbers(call: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.hint
