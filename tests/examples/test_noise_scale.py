"""The gradient noise scale: exact, estimated, and the hyperbola."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import graphopt
from graphopt.examples.common import WorkloadError
from graphopt.examples.noise_scale.data import checked, digits
from graphopt.examples.noise_scale.model import exact_noise, fit_hyperbola, mlp, two_batch_noise
from graphopt.examples.noise_scale.train import case
from tests.examples.contract import one_exact_graph


def test_exact_noise_is_that_of_gradients_one_by_one() -> None:
    torch.manual_seed(0)
    model, (images, labels) = mlp(8), digits()
    images, labels = images[:30], labels[:30]
    rows = []
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        rows.append(np.concatenate([p.grad.numpy().ravel() for p in model.parameters()]))
    gradients = np.array(rows, dtype=np.float64)
    found = exact_noise(model, images, labels)
    assert found.trace == pytest.approx(np.trace(np.cov(gradients.T)), rel=1e-5)
    assert found.square == pytest.approx((gradients.mean(0) ** 2).sum(), rel=1e-5)


def test_two_batch_sizes_give_trace_and_square() -> None:
    """Gaussian gradients with known mean and covariance."""
    generator = np.random.default_rng(0)
    mean, deviation = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, 2.0])
    sizes = (4, 64)
    norms = [
        ((mean + deviation * generator.normal(size=(200_000, 3)) / np.sqrt(size)) ** 2).sum(1)
        for size in sizes
    ]
    found = two_batch_noise(torch.tensor(norms[0]), torch.tensor(norms[1]), sizes)
    assert found.trace == pytest.approx(14.0, rel=0.02)
    assert found.square == pytest.approx(5.25, rel=0.02)
    assert found.scale == pytest.approx(14 / 5.25, rel=0.03)


def test_a_hyperbola_is_found_again() -> None:
    batches = [1, 2, 4, 8, 32, 128, 512]
    fit = fit_hyperbola(batches, [20 * (1 + 30 / b) for b in batches])
    assert fit.fewest == pytest.approx(20, rel=1e-6)
    assert fit.critical == pytest.approx(30, rel=1e-6)
    assert fit.error < 1e-6
    assert fit.steps(30) == pytest.approx(40, rel=1e-6)


def test_noise_grows_in_a_short_training() -> None:
    torch.manual_seed(0)
    model, (images, labels) = graphopt.optimize(mlp(), backend="eager"), digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = exact_noise(model, images, labels).scale
    for batch in torch.randperm(len(images))[: 32 * 50].split(32) * 12:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    assert exact_noise(model, images, labels).scale > 2 * before


def test_gradients_are_those_of_eager() -> None:
    torch.manual_seed(0)
    one_exact_graph(case(torch.device("cpu")))


def test_bad_data_is_named() -> None:
    images, labels = digits()
    with pytest.raises(WorkloadError, match="images is empty"):
        checked(images[:0], labels[:0])
    with pytest.raises(WorkloadError, match="images has shape"):
        checked(images[:, :5], labels)
    with pytest.raises(WorkloadError, match="labels has shape"):
        checked(images, labels[:-1])
    images[7, 3] = torch.nan
    with pytest.raises(WorkloadError, match=r"images holds 1 .* at \[7, 3\]"):
        checked(images, labels)
