"""Estimators against closed forms, and the U-net's step through the compiler."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from graphopt.examples.common import Run, WorkloadError
from graphopt.examples.common.checkpoint import Checkpoint
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.results import Results
from graphopt.examples.unknown_operator.data import (
    NOISE,
    POINTS,
    SCALE,
    Pairs,
    blur,
    checked,
    draw,
    signals,
)
from graphopt.examples.unknown_operator.linear import Dense, Filter, Wiener, mean_square
from graphopt.examples.unknown_operator.model import UNet
from graphopt.examples.unknown_operator.train import case, estimate, train
from tests.examples.contract import one_exact_graph


def _matrix() -> np.ndarray:
    """T, point by point."""
    x = np.arange(POINTS)
    distance = np.abs(x[:, None] - x) / POINTS
    kernel = np.exp(-np.minimum(distance, 1 - distance) / SCALE)
    return kernel / kernel.sum(1, keepdims=True)


def test_operator_is_the_convolution() -> None:
    signal = signals(5, torch.Generator().manual_seed(0))
    expected = signal[:, 0].double().numpy() @ _matrix().T
    assert np.allclose(blur(signal)[:, 0].numpy(), expected, atol=1e-6)


def test_signals_are_a_box_and_a_sine() -> None:
    """Two jumps of one height, and nothing else that is rough."""
    for signal in signals(50, torch.Generator().manual_seed(1))[:, 0]:
        steps = signal - signal.roll(1)
        a, b = steps.abs().topk(2).indices
        assert steps[a].sign() == -steps[b].sign()
        # A sine of frequency 3 and amplitude 0.8 moves by less than this from point to point.
        assert steps.abs().topk(3).values[-1] <= 0.8 * 2 * math.pi * 3 / POINTS
        assert steps[a].abs() > 0.35


def test_wiener_is_the_best_linear_estimator() -> None:
    """C Tᵀ (T C Tᵀ + σ² I)⁻¹, with the covariance of the same examples on a circle."""
    examples = signals(4000, torch.Generator().manual_seed(2))
    wiener = Wiener(examples)
    f = examples[:, 0].double().numpy()
    lags = [np.mean(f * np.roll(f, shift, 1)) for shift in range(POINTS)]
    x = np.arange(POINTS)
    covariance = np.array(lags)[(x[:, None] - x) % POINTS]
    t = _matrix()
    gain = covariance @ t.T @ np.linalg.inv(t @ covariance @ t.T + NOISE**2 * np.eye(POINTS))
    pairs = draw("pairs", 300, torch.Generator().manual_seed(3))
    observed = pairs.observed[:, 0].double().numpy()
    assert np.allclose(wiener(pairs.observed)[:, 0].numpy(), observed @ gain.T, atol=1e-8)
    expected = np.trace(covariance - gain @ t @ covariance) / POINTS
    assert mean_square(wiener(pairs.observed), pairs.signal) == pytest.approx(expected, rel=0.05)


def test_dense_is_ridge_regression_and_approaches_wiener() -> None:
    random = torch.Generator().manual_seed(4)
    train_, validation, test = (draw("pairs", count, random) for count in (20_000, 64, 500))
    few = Dense(Pairs(*(t[:20] for t in train_)), validation)
    x, y = (t[:20, 0].double().numpy() for t in train_)
    centred, target = x - x.mean(0), y - y.mean(0)
    ridge = centred.T @ centred / 20 + few.ridge * np.eye(POINTS)
    matrix = np.linalg.solve(ridge, centred.T @ target / 20)
    expected = (test.observed[:, 0].double().numpy() - x.mean(0)) @ matrix + y.mean(0)
    assert np.allclose(few(test.observed)[:, 0].numpy(), expected, atol=1e-8)
    wiener = mean_square(Wiener(train_.signal)(test.observed), test.signal)
    many = mean_square(Dense(train_, validation)(test.observed), test.signal)
    assert wiener < many < 1.03 * wiener
    learnt = mean_square(Filter(train_)(test.observed), test.signal)
    assert learnt == pytest.approx(wiener, rel=0.01)
    assert mean_square(few(test.observed), test.signal) > 3 * wiener


def test_unet_turns_with_the_circle() -> None:
    """By steps of its coarsest scale."""
    torch.manual_seed(0)
    model, observed = UNet(), torch.randn(2, 1, POINTS)
    with torch.no_grad():
        turned = model(observed.roll(8, 2))
        assert torch.allclose(turned, model(observed).roll(8, 2), atol=1e-6)
        assert not torch.allclose(turned, model(observed), atol=1e-3)
    assert sum(p.numel() for p in model.parameters()) < 12_000


def test_short_training_beats_the_observation(tmp_path: Path) -> None:
    """From 32 pairs; 100 steps; and what is kept is the best on validation pairs."""
    settings = {"seed": 0, "epochs": 1, "backend": "none"}
    run = Run(
        checkpoint=Checkpoint(settings),
        results=Results("test", settings),
        output=tmp_path,
        device=torch.device("cpu"),
        console=Console(quiet=True),
        interrupts=Interrupts(),
    )
    random = torch.Generator().manual_seed(5)
    pairs, validation, test = draw("a", 32, random), draw("b", 64, random), draw("c", 256, random)
    torch.manual_seed(0)
    model = UNet()
    start = mean_square(estimate(model, test.observed), test.signal)
    train(run, "short", model, pairs, validation)
    found = mean_square(estimate(model, test.observed), test.signal)
    assert found < 0.9 * mean_square(test.observed, test.signal)
    assert found < 0.2 * start


def test_gradients_are_those_of_pytorch() -> None:
    one_exact_graph(case(torch.device("cpu")))


@pytest.mark.parametrize(
    ("observed", "signal", "message"),
    [
        (torch.zeros(0, 1, POINTS), torch.zeros(0, 1, POINTS), "observed echoes is empty"),
        (torch.zeros(3, 1, 100), torch.zeros(3, 1, 100), "observed echoes has shape"),
        (torch.zeros(3, 1, POINTS), torch.zeros(2, 1, POINTS), "signals of echoes has shape"),
        (
            torch.zeros(3, 1, POINTS),
            torch.full((3, 1, POINTS), math.nan),
            "384 values",
        ),
    ],
)
def test_bad_pairs_are_named(observed: Tensor, signal: Tensor, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        checked("echoes", Pairs(observed, signal))
