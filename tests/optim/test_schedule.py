"""Polynomial decay, the momentum tied to it, and the published settings."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import ArgumentError
from graphopt.optim import SP_NGD, PolynomialDecay, polynomial_decay

PLAN: dict[str, Any] = {"start": 1.0, "end": 3.5, "power": 3, "steps_per_epoch": 4}
STEPS = 18  # up to epoch 4.5, beyond the end


def sgd(rate: float = 0.5, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=rate, momentum=momentum)


def series(optimizer: torch.optim.Optimizer, **options: Any) -> list[tuple[float, float]]:
    """Learning rate and momentum of each step."""
    scheduler = PolynomialDecay(optimizer, **(PLAN | options))
    found = []
    for _ in range(STEPS):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
        optimizer.step()
        scheduler.step()
    return found


def exact_factor(step: int) -> Fraction:
    done = (Fraction(step, 4) - 1) / (Fraction(7, 2) - 1)
    return (1 - min(max(done, Fraction(0)), Fraction(1))) ** 3


FACTORS = [float(exact_factor(step)) for step in range(STEPS)]


def test_learning_rate_is_constant_then_a_power_then_zero() -> None:
    rates = [rate for rate, _ in series(sgd(0.5))]
    assert rates == pytest.approx([0.5 * f for f in FACTORS], rel=1e-14, abs=0)
    assert rates[:5] == [0.5] * 5
    assert rates[5] < 0.5
    assert rates[13] > 0
    assert rates[14:] == [0.0] * 4


def test_momentum_is_proportional_to_the_learning_rate() -> None:
    momentums = [m for _, m in series(sgd(momentum=0.9), momentum="proportional")]
    assert momentums == pytest.approx([0.9 * f for f in FACTORS], rel=1e-14, abs=0)


def test_momentum_is_scaled_by_the_ratio_of_learning_rates() -> None:
    momentums = [m for _, m in series(sgd(momentum=0.9), momentum="ratio")]
    ratios = [1.0] + [b / a if a else 0.0 for a, b in pairwise(FACTORS)]
    assert momentums == pytest.approx([0.9 * r for r in ratios], rel=1e-13, abs=0)
    assert momentums[:5] == [0.9] * 5


@pytest.mark.parametrize("tie", ["proportional", "ratio"])
def test_sgd_makes_the_updates_that_the_formulas_mean(tie: str) -> None:
    """v = m v - eta g, w += v by hand, against SGD with its own buffer of gradients."""
    gradients = torch.randn(STEPS, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    formulas = series(sgd(), momentum=tie)
    weight, velocity = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    by_hand = []
    for (rate, momentum), gradient in zip(formulas, gradients, strict=True):
        velocity = momentum * velocity - rate * gradient
        weight = weight + velocity
        by_hand.append(weight)

    def run(buffer: str) -> torch.Tensor:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=0.5, momentum=0.9)
        options: Any = {"momentum": tie, "buffer": buffer}
        scheduler = PolynomialDecay(optimizer, **PLAN, **options)
        weights = []
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            scheduler.step()
            weights.append(parameter.detach().clone())
        return torch.stack(weights)

    torch.testing.assert_close(run("gradients"), torch.stack(by_hand), rtol=1e-13, atol=1e-13)
    assert (run("updates") - torch.stack(by_hand)).abs().max() > 1e-3


def test_each_group_decays_from_its_own_values() -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "momentum": 0.5},
        {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1, "momentum": 0.8},
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = PolynomialDecay(optimizer, **PLAN)
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    factor = FACTORS[8]
    assert scheduler.get_last_lr() == pytest.approx([factor, 0.1 * factor], rel=1e-14)
    assert scheduler.get_momentum() == pytest.approx([0.5 * factor, 0.8 * factor], rel=1e-14)


def test_an_optimizer_without_momentum_needs_to_say_so() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.5)
    with pytest.raises(ArgumentError, match="AdamW has no momentum"):
        PolynomialDecay(optimizer, **PLAN)
    scheduler = PolynomialDecay(optimizer, **PLAN, momentum=None)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.5 * FACTORS[6]], rel=1e-14)
    assert scheduler.get_momentum() == []


@pytest.mark.parametrize("tie", ["proportional", "ratio"])
@pytest.mark.parametrize("way", ["state", "last_epoch"])
def test_a_resumed_schedule_is_the_uninterrupted_one(tie: str, way: str) -> None:
    expected = series(sgd(), momentum=tie)
    optimizer = sgd()
    options: Any = {**PLAN, "momentum": tie}
    scheduler = PolynomialDecay(optimizer, **options)
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    resumed_optimizer = sgd(rate=7.0, momentum=0.1)
    if way == "state":
        resumed = PolynomialDecay(resumed_optimizer, **options)
        resumed.load_state_dict(scheduler.state_dict())
        resumed_optimizer.load_state_dict(optimizer.state_dict())
    else:
        resumed_optimizer.load_state_dict(optimizer.state_dict())
        resumed = PolynomialDecay(resumed_optimizer, **options, last_epoch=8)
    found = []
    for _ in range(9, STEPS):
        group = resumed_optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
        resumed_optimizer.step()
        resumed.step()
    assert found == expected[9:]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"end": 1.0}, "from epoch 1.0 to epoch 1.0 is impossible"),
        ({"end": 0.5}, "is impossible"),
        ({"start": -1.0}, "is impossible"),
        ({"start": float("nan")}, "is impossible"),
        ({"power": 0.0}, "power=0.0 is not positive"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0 is not positive"),
        ({"momentum": "linear"}, "momentum='linear'"),
        ({"buffer": "velocity"}, "buffer='velocity'"),
    ],
)
def test_impossible_schedules_are_refused(wrong: dict[str, Any], message: str) -> None:
    optimizer = sgd()
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    with pytest.raises(ArgumentError, match=message):
        PolynomialDecay(optimizer, **(PLAN | wrong))
    after = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert after == before


def test_published_settings() -> None:
    assert list(SP_NGD) == [2**k for k in range(12, 18)]
    for size, row in SP_NGD.items():
        assert row.batch_size == size
        assert row.start < row.epochs < row.end
    row = SP_NGD[32768]
    assert (row.learning_rate, row.momentum, row.damping) == (3e-2, 0.97, 2e-4)
    assert (row.mixup_alpha, row.power, row.start, row.end) == (0.6, 3.5, 1.5, 49.5)
    sizes = list(SP_NGD.values())
    for smaller, larger in pairwise(sizes):
        assert smaller.learning_rate < larger.learning_rate
        assert smaller.momentum > larger.momentum
        assert smaller.damping >= larger.damping
        assert smaller.mixup_alpha <= larger.mixup_alpha


def test_settings_make_their_schedule() -> None:
    row = SP_NGD[131072]
    optimizer = sgd(rate=9.0, momentum=0.1)
    scheduler = row.scheduler(optimizer, steps_per_epoch=10)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (7e-2, 0.93)
    for _ in range(480):
        optimizer.step()
        scheduler.step()
    factor = polynomial_decay(48.0, start=1.0, end=95.0, power=3.0)
    assert factor == 0.125
    assert scheduler.get_last_lr() == [7e-2 * factor]
    assert optimizer.param_groups[0]["momentum"] == 0.93 * factor


def test_settings_replace_those_of_an_earlier_schedule() -> None:
    optimizer = sgd(rate=9.0, momentum=0.1)
    PolynomialDecay(optimizer, **PLAN)
    scheduler = SP_NGD[65536].scheduler(optimizer, steps_per_epoch=10)
    assert (scheduler.get_last_lr(), scheduler.get_momentum()) == ([4e-2], [0.95])


def test_settings_refuse_an_optimizer_without_momentum() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.5)
    with pytest.raises(ArgumentError, match="AdamW has no momentum"):
        SP_NGD[4096].scheduler(optimizer, steps_per_epoch=10)
    assert optimizer.param_groups[0]["lr"] == 0.5
