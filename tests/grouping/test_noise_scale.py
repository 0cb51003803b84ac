"""The gradient noise scale on gradients whose covariance is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graphopt.errors import ArgumentError
from graphopt.grouping.noise_scale import NoiseScale, estimate

RANKS, BATCH, SIZE = 8, 4, 20


class Problem:
    """Draws the two norms of a step; example gradients are normal with a diagonal covariance."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.deviations = np.linspace(0.5, 2.0, SIZE)
        self.gradient = np.full(SIZE, 0.1)
        self.trace = float((self.deviations**2).sum())
        self.gradient_squared = float((self.gradient**2).sum())

    def step(self, ranks: int = RANKS, batch: int = BATCH) -> tuple[float, float, int, int]:
        noise = self.random.normal(size=(ranks, SIZE)) * self.deviations / math.sqrt(batch)
        local = self.gradient + noise
        mean = local.mean(0)
        return float((local**2).sum(1).mean()), float((mean**2).sum()), ranks, batch


@pytest.mark.parametrize(("ranks", "batch"), [(2, 1), (8, 4), (3, 32)])
def test_estimates_are_unbiased(ranks: int, batch: int) -> None:
    problem = Problem()
    draws = np.array([estimate(*problem.step(ranks, batch)) for _ in range(4000)])
    errors = draws.mean(0) - (problem.trace, problem.gradient_squared)
    deviations = draws.std(0) / math.sqrt(len(draws))
    assert (np.abs(errors) < 4 * deviations).all()
    # Sharp enough to tell them from the norms taken as they are.
    bias_of_plain = problem.trace / np.array([ranks, ranks * batch])
    assert (8 * deviations < bias_of_plain).all()


def test_averages_are_divided_last() -> None:
    problem = Problem(seed=1)
    true = problem.trace / problem.gradient_squared
    scale, ratios = NoiseScale(decay=0.9995), []
    for _ in range(20_000):
        step = problem.step()
        scale.update(*step)
        trace, gradient_squared = estimate(*step)
        ratios.append(trace / gradient_squared)
    assert scale.value is not None
    assert abs(scale.value / true - 1) < 0.2
    assert abs(np.mean(ratios) / true - 1) > 0.3


def test_changes_of_batch_and_ranks_keep_the_units() -> None:
    problem = Problem(seed=2)
    scale = NoiseScale(decay=0.999)
    for index in range(8000):
        scale.update(*problem.step(ranks=2 + index % 7, batch=16 << index % 3))
    assert scale.value is not None
    assert abs(scale.value / (problem.trace / problem.gradient_squared) - 1) < 0.2


def test_first_step_counts_in_full() -> None:
    scale = NoiseScale(decay=0.95)
    scale.update(5.0, 3.0, 2, 10)  # trace 40, squared gradient 1
    assert scale.trace == pytest.approx(40)
    assert scale.gradient_squared == pytest.approx(1)
    assert scale.value == pytest.approx(40)
    scale.update(3.0, 3.0, 2, 10)  # trace 0, squared gradient 3
    assert scale.trace == pytest.approx(40 * 0.95 / 1.95)
    assert scale.gradient_squared == pytest.approx((0.95 + 3) / 1.95)
    assert scale.steps == 2


def test_no_value_without_data_or_while_noise_hides_the_gradient() -> None:
    scale = NoiseScale()
    assert (scale.value, scale.trace, scale.gradient_squared, scale.steps) == (None, None, None, 0)
    scale.update(4.0, 1.0, 2, 1)  # squared gradient -2
    assert scale.value is None
    assert scale.gradient_squared == pytest.approx(-2)
    scale.update(4.0, 4.0, 2, 1)  # squared gradient 4
    assert scale.value is not None
    assert scale.value > 0


def test_equal_gradients_have_no_noise() -> None:
    scale = NoiseScale()
    scale.update(2.0, 2.0 + 1e-15, 4, 8)  # rounding makes the mean a bit larger
    assert scale.value == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_steps_that_are_not_finite_are_left_out(bad: float) -> None:
    scale = NoiseScale()
    scale.update(5.0, 3.0, 2, 10)
    before = scale.value
    scale.update(bad, 3.0, 2, 10)
    scale.update(bad, bad, 2, 10)
    assert (scale.value, scale.steps) == (before, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((1.0, 1.0, 1, 8), "ranks=1"),
        ((1.0, 1.0, 0, 8), "ranks=0"),
        ((1.0, 1.0, 2, 0), "batch=0"),
        ((-1.0, 1.0, 2, 8), "negative"),
        ((1.0, -1.0, 2, 8), "negative"),
    ],
)
def test_bad_steps_are_refused_and_change_nothing(
    call: tuple[float, float, int, int], message: str
) -> None:
    scale = NoiseScale()
    with pytest.raises(ArgumentError, match=message) as caught:
        scale.update(*call)
    assert caught.value.hint
    assert scale.steps == 0


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_bad_decay_is_refused(decay: float) -> None:
    with pytest.raises(ArgumentError, match="decay"):
        NoiseScale(decay)


def test_no_decay_keeps_the_last_step() -> None:
    scale = NoiseScale(decay=0)
    scale.update(5.0, 3.0, 2, 10)
    scale.update(6.0, 4.0, 2, 10)
    assert scale.trace == pytest.approx(40)
    assert scale.gradient_squared == pytest.approx(2)
