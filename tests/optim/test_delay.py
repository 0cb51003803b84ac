"""Delay laws, batch scaling, compensation, and the quadratic that says what is stable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.errors import ArgumentError
from graphopt.optim import (
    DelayedQuadratic,
    DelayedSGD,
    accumulated_delay,
    alternating_delay,
    pipelined_delay,
    scale_to_batch,
    spike_compensation,
)


def test_the_two_laws_differ_by_a_factor_of_two() -> None:
    assert [pipelined_delay(s, 4) for s in range(4)] == [6, 4, 2, 0]
    assert [alternating_delay(s, 4) for s in range(4)] == [3, 2, 1, 0]


def test_laws_agree_with_the_time_steps_of_a_pipeline() -> None:
    """Sample 0 moves one stage per time step; what stage s updates in between is counted."""
    stages = 5
    for stage in range(stages):
        forward, back = stage, 2 * (stages - 1) - stage
        assert pipelined_delay(stage, stages) == len(range(forward, back))


@pytest.mark.parametrize(("delay", "accumulate", "updates"), [(6, 1, 6), (6, 4, 2), (0, 4, 0)])
def test_accumulation_shortens_the_delay(delay: int, accumulate: int, updates: int) -> None:
    assert accumulated_delay(delay, accumulate) == updates


def test_batch_scaling_against_known_numbers() -> None:
    one = scale_to_batch(1.0, 0.9, tuned=128, batch=1)
    assert one.momentum == pytest.approx(0.99917721, abs=5e-9)
    assert one.lr == pytest.approx(6.428e-5, rel=1e-4)
    more = scale_to_batch(1.0, 0.9, tuned=128, batch=32)
    assert more.momentum == pytest.approx(0.974004, abs=5e-7)
    assert more.lr == pytest.approx(0.06499, rel=1e-4)


@given(
    lr=st.floats(1e-4, 1),
    momentum=st.floats(0.1, 0.99),
    tuned=st.integers(1, 512),
    batch=st.integers(1, 512),
)
@settings(max_examples=60, deadline=None)
def test_batch_scaling_keeps_half_life_and_weight_per_sample(
    lr: float, momentum: float, tuned: int, batch: int
) -> None:
    scaled = scale_to_batch(lr, momentum, tuned=tuned, batch=batch)
    if not 1e-12 < scaled.momentum < 1 - 1e-9:
        return
    assert batch / math.log(scaled.momentum) == pytest.approx(tuned / math.log(momentum), rel=1e-5)
    weight = scaled.lr / ((1 - scaled.momentum) * batch)
    assert weight == pytest.approx(lr / ((1 - momentum) * tuned), rel=1e-6)


@given(momentum=st.floats(0, 0.999), delay=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_spike_compensation_makes_up_what_was_missed(momentum: float, delay: int) -> None:
    a, b = spike_compensation(momentum, delay)
    assert a + b == pytest.approx(math.fsum(momentum**i for i in range(delay + 1)), rel=1e-9)
    assert a / (1 - momentum) + b == pytest.approx(1 / (1 - momentum), rel=1e-9)


# -- the quadratic ---------------------------------------------------------------------------------


def simulated_decay(x: float, momentum: float, delay: int, steps: int, **options: Any) -> float:
    """The decay per update of the real optimizer on ``x w^2 / 2``, from its envelope."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = DelayedSGD([weight], lr=1.0, momentum=momentum, delay=delay, **options)
    seen: list[torch.Tensor] = []
    weights = []
    for _ in range(steps):
        forward = optimizer.predict().get(weight, weight.detach())
        seen.append(x * forward.clone())
        if len(seen) > delay:
            weight.grad = seen[-1 - delay]
            optimizer.step()
        weights.append(weight.item())
    # The norm of a sliding window hides the oscillation.
    window = 40
    energy = np.convolve(np.square(weights), np.ones(window), "valid")[steps // 3 :]
    slope = np.polyfit(np.arange(len(energy)), np.log(energy) / 2, 1)[0]
    return float(np.exp(slope))


RULES = {
    "none": {"compensation": "none"},
    "spike": {},
    "nesterov": {"compensation": "nesterov"},
    "velocity": {"compensation": "none", "prediction": "velocity"},
    "velocity + spike": {"prediction": "velocity"},
    "weight": {"compensation": "none", "prediction": "weight"},
    "weight + spike": {"prediction": "weight"},
    "geometric": {"compensation": "none", "prediction": "geometric"},
    "geometric + spike": {"prediction": "geometric"},
    "own": {"compensation": (0.7, 1.3), "prediction": "weight", "horizon": 1.5},
}


def quadratic(momentum: float, delay: int, options: dict[str, Any]) -> DelayedQuadratic:
    chosen = options.get("compensation", "spike")
    if chosen == "spike":
        # Written out: the missed steps of a late gradient.
        a, b = momentum**delay, sum(momentum**i for i in range(delay))
    else:
        a, b = {"none": (1.0, 0.0), "nesterov": (momentum, 1.0)}.get(chosen, chosen)
    horizon = options.get("horizon", delay)
    return DelayedQuadratic(momentum, delay, a, b, options.get("prediction"), horizon)


@pytest.mark.parametrize("delay", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("rule", RULES)
def test_the_largest_root_is_the_decay_of_the_optimizer(rule: str, delay: int) -> None:
    model = quadratic(0.8, delay, RULES[rule])
    x = 0.4 * min(model.largest_stable(), 1.0)
    found = simulated_decay(x, 0.8, delay, 600, **RULES[rule])
    assert found == pytest.approx(model.decay(x), abs=2e-3)


@pytest.mark.parametrize("delay", [0, 1, 2, 5, 20, 128])
def test_threshold_without_momentum_is_the_closed_form(delay: int) -> None:
    closed = 2 * math.sin(math.pi / (4 * delay + 2))
    assert DelayedQuadratic(0.0, delay).largest_stable() == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("delay", [0, 3])
def test_the_optimizer_itself_turns_unstable_at_the_threshold(delay: int) -> None:
    edge = 2 * math.sin(math.pi / (4 * delay + 2))
    assert simulated_decay(0.99 * edge, 0.0, delay, 2000, compensation="none") < 1
    assert simulated_decay(1.01 * edge, 0.0, delay, 2000, compensation="none") > 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("delay", [1, 3, 7])
def test_roots_leave_the_circle_where_it_is_said(rule: str, delay: int) -> None:
    model = quadratic(0.9, delay, RULES[rule])
    edge = model.largest_stable()
    # Everything below is stable, not only what lies next to the edge.
    assert all(model.decay(share * edge) < 1 + 1e-9 for share in (0.01, 0.2, 0.5, 0.8, 0.999))
    assert model.decay(1.001 * edge) > 1


def test_momentum_without_delay_is_stable_up_to_the_textbook_limit() -> None:
    assert DelayedQuadratic(0.9).largest_stable() == pytest.approx(2 * 1.9)


@given(
    momentum=st.floats(0.05, 0.95),
    delay=st.integers(0, 12),
    horizon=st.floats(0, 20),
    x=st.floats(1e-3, 1),
)
@settings(max_examples=60, deadline=None)
def test_prediction_alone_is_a_compensation(
    momentum: float, delay: int, horizon: float, x: float
) -> None:
    """LWP(T) and GSC with b = T/m, a = 1 + T - T/m have one polynomial."""
    a, b = 1 + horizon - horizon / momentum, horizon / momentum
    compensated = DelayedQuadratic(momentum, delay, a, b).polynomial(x).coef
    velocity = DelayedQuadratic(momentum, delay, 1, 0, "velocity", horizon).polynomial(x).coef
    assert velocity == pytest.approx(compensated, abs=1e-9)
    # The weight form has one more root, at 0.
    weight = DelayedQuadratic(momentum, delay, 1, 0, "weight", horizon).polynomial(x).coef
    assert weight[0] == pytest.approx(0, abs=1e-9)
    assert weight[1:] == pytest.approx(compensated, abs=1e-9)


def test_long_predictions_lower_the_stable_rate_and_compensation_does_not() -> None:
    for delay in (64, 128):
        plain = DelayedQuadratic(0.9, delay).largest_stable()
        spike = DelayedQuadratic(0.9, delay, *spike_compensation(0.9, delay)).largest_stable()
        linear = DelayedQuadratic(0.9, delay, 1, 0, "velocity", delay).largest_stable()
        assert linear < plain < spike


BAD = [
    (lambda: pipelined_delay(4, 4), "a pipeline of 4 stages has no stage 4"),
    (lambda: alternating_delay(-1, 4), "a pipeline of 4 stages has no stage -1"),
    (lambda: accumulated_delay(-1, 1), "delay=-1 with accumulate=1 is impossible"),
    (lambda: accumulated_delay(1, 0), "delay=1 with accumulate=0 is impossible"),
    (lambda: scale_to_batch(0.1, 1.0, tuned=128, batch=1), "momentum=1.0"),
    (lambda: scale_to_batch(0.1, 0.9, tuned=0, batch=1), "tuned=0"),
    (lambda: spike_compensation(1.0, 3), "there is no compensation for momentum=1.0 and delay=3"),
    (lambda: spike_compensation(0.9, -1), "delay=-1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_impossible_numbers_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
