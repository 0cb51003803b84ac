"""nDNN, mcDNN and TNet: closed forms, the adjoint of the heat equation, and the captured step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.linalg import spsolve

from graphopt.examples.common import Run, WorkloadError
from graphopt.examples.common.checkpoint import Checkpoint
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.results import Results
from graphopt.examples.inverse_tikhonov.baselines import HeatInversion, tikhonov
from graphopt.examples.inverse_tikhonov.data import Pairs, draw_pairs, load_pairs
from graphopt.examples.inverse_tikhonov.model import (
    NDNN,
    GaussianPrior,
    InverseNetwork,
    McDNN,
    Objective,
    TNet,
    whitening,
)
from graphopt.examples.inverse_tikhonov.problems import Deconvolution, HeatConduction
from graphopt.examples.inverse_tikhonov.train import case
from graphopt.examples.inverse_tikhonov.training import train_affine, train_network
from tests.examples.contract import one_exact_graph

NOISE, ALPHA = 0.1, 0.7


def _run(folder: Path) -> Run:
    return Run(
        checkpoint=Checkpoint({}),
        results=Results("inverse_tikhonov", {"seed": 0, "epochs": 1, "backend": "eager"}),
        output=folder,
        device=torch.device("cpu"),
        console=Console(quiet=True),
        interrupts=Interrupts(),
    )


def _blur(samples: int) -> tuple[Deconvolution, GaussianPrior, Pairs]:
    problem, prior = Deconvolution(12, 0.1), GaussianPrior((12,), 0.15, 1.0, mean=0.3)
    generator = torch.Generator().manual_seed(3)
    return problem, prior, draw_pairs(prior, problem, NOISE, samples, generator)


def _normal_equations(kind: type[Objective], data: Pairs, problem: Deconvolution) -> np.ndarray:
    """The best affine map [A b] by least squares over the whole of its entries, row by row.

    Written out as one large system in (A, b), from the definition of the losses; shares neither
    the whitening nor the closed forms of the example.
    """
    cells = 12
    h = 1 / cells
    precision = np.eye(cells)
    for i in range(cells):  # (I - l^2 Laplacian) with zero flux at both ends
        for j in (i - 1, i + 1):
            if 0 <= j < cells:
                precision[i, i] += (0.15 / h) ** 2
                precision[i, j] -= (0.15 / h) ** 2
    scale = np.sqrt((np.linalg.inv(precision) ** 2).sum() / cells)
    W = precision * scale  # Gamma^{-1/2}
    G = problem.matrix.numpy()
    u, y = data.u.numpy(), data.y.numpy()
    rows, targets = [], []
    for ui, yi in zip(u, y, strict=True):
        inputs = np.kron(np.eye(cells), np.append(yi, 1.0))  # (A, b) -> A y + b
        regression = (W @ inputs, W @ ui, 1.0)
        misfit = (G @ inputs / NOISE, yi / NOISE, 1.0)
        shrink = (W @ inputs, W @ np.full(cells, 0.3), ALPHA)
        terms = {
            NDNN: [regression],
            McDNN: [regression, (*misfit[:2], ALPHA)],
            TNet: [misfit, shrink],
        }[kind]
        for left, right, weight in terms:
            rows.append(np.sqrt(weight) * left)
            targets.append(np.sqrt(weight) * right)
    solution, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)
    return solution.reshape(cells, cells + 1)


@pytest.mark.parametrize("kind", [NDNN, McDNN, TNet])
def test_affine_networks_reach_the_least_squares_solution(
    kind: type[Objective], tmp_path: Path
) -> None:
    problem, prior, data = _blur(30)
    network = InverseNetwork(data.y, whitening(data.y), 12, 0)
    objective = kind(network, problem, prior, NOISE, ALPHA)
    expected = _normal_equations(kind, data, problem)
    train_affine(_run(tmp_path), "affine", objective, data)
    y = torch.randn(50, 12, dtype=torch.float64)
    found = objective.invert(y).detach().numpy()
    wanted = y.numpy() @ expected[:, :12].T + expected[:, 12]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


def test_tnet_with_enough_observations_is_the_tikhonov_inverse(tmp_path: Path) -> None:
    problem, prior, data = _blur(30)
    objective = TNet(InverseNetwork(data.y, whitening(data.y), 12, 0), problem, prior, NOISE)
    train_affine(_run(tmp_path), "affine", objective, data)
    G, mean = problem.matrix.numpy(), prior.mean.numpy()
    gamma = (prior.root @ prior.root).numpy()
    y = np.random.default_rng(1).standard_normal((5, 12))
    solved = [  # the other form of the normal equations, over parameters
        np.linalg.solve(
            G.T @ G / NOISE**2 + np.linalg.inv(gamma),
            G.T @ yi / NOISE**2 + np.linalg.solve(gamma, mean),
        )
        for yi in y
    ]
    np.testing.assert_allclose(objective.invert(torch.tensor(y)).detach(), solved, atol=1e-8)
    np.testing.assert_allclose(tikhonov(G, gamma, mean, NOISE)(y), solved, atol=1e-8)


SIDE = 4


def _temperatures(u: np.ndarray) -> np.ndarray:
    """A sparse five-point system written cell by cell; the observed temperatures."""
    k, h = np.exp(u).reshape(SIDE, SIDE), 1 / SIDE
    system = sparse.lil_matrix((SIDE * SIDE, SIDE * SIDE))
    for i in range(SIDE):
        for j in range(SIDE):
            for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= a < SIDE and 0 <= b < SIDE:
                    t = 1 / (0.5 / k[i, j] + 0.5 / k[a, b])
                    system[i * SIDE + j, i * SIDE + j] += t / h**2
                    system[i * SIDE + j, a * SIDE + b] -= t / h**2
                elif b < 0:
                    system[i * SIDE + j, i * SIDE + j] += 2 * k[i, j] / h**2
    w = spsolve(system.tocsr(), np.ones(SIDE * SIDE)).reshape(SIDE, SIDE)
    return w[1::2, 1::2].ravel()


def test_heat_equation_and_its_gradient() -> None:
    problem = HeatConduction(SIDE, 2)
    u = 0.5 * torch.randn(3, SIDE**2, dtype=torch.float64)
    u.requires_grad_()
    weights = torch.randn(3, len(problem.observed), dtype=torch.float64)
    seen = problem(u)
    expected = np.stack([_temperatures(row) for row in u.detach().numpy()])
    np.testing.assert_allclose(seen.detach(), expected, rtol=1e-12)
    (weights * seen).sum().backward()
    step = 1e-5
    for sample in range(3):
        for cell in range(SIDE**2):
            moved = u[sample].detach().numpy().copy()
            moved[cell] += step
            above = weights[sample].numpy() @ _temperatures(moved)
            moved[cell] -= 2 * step
            below = weights[sample].numpy() @ _temperatures(moved)
            slope = (above - below) / (2 * step)
            assert u.grad is not None
            assert float(u.grad[sample, cell]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_gauss_newton_finds_the_minimum() -> None:
    problem, prior = HeatConduction(SIDE, 2), GaussianPrior((SIDE, SIDE), 0.3, 0.5)
    data = draw_pairs(prior, problem, 0.01, 2, torch.Generator().manual_seed(0))
    root, mean = prior.root.numpy(), prior.mean.numpy()
    solver = HeatInversion(SIDE, problem.observed.numpy(), root, mean, 0.01)
    for y in data.y.numpy():

        def functional(v: np.ndarray, y: np.ndarray = y) -> float:
            return 0.5 * np.sum(((y - _temperatures(mean + root @ v)) / 0.01) ** 2) + 0.5 * v @ v

        found, _ = solver(y, tolerance=1e-12)
        best = minimize(functional, np.zeros(SIDE**2), method="BFGS", options={"gtol": 1e-5})
        v = np.linalg.solve(root, found - mean)
        assert functional(v) <= best.fun * (1 + 1e-6)
        np.testing.assert_allclose(found, mean + root @ best.x, atol=1e-3)


def test_a_short_training_of_tnet_moves_towards_tikhonov(tmp_path: Path) -> None:
    problem, prior, data = _blur(40)
    classic = tikhonov(
        problem.matrix.numpy(), (prior.root @ prior.root).numpy(), prior.mean.numpy(), NOISE
    )(data.y.numpy())
    network = InverseNetwork(data.y, whitening(data.y, 0.1), 12, 64)
    objective = TNet(network, problem, prior, NOISE)

    def distance() -> float:
        found = objective.invert(data.y).detach().numpy()
        return float(np.linalg.norm(found - classic) / np.linalg.norm(classic - 0.3))

    before = distance()
    train_network(_run(tmp_path), "short", objective, data[:30], data[30:], 1.0, 200)
    assert before > 0.8
    assert distance() < 0.4


def test_the_step_of_the_case_is_one_exact_graph() -> None:
    assert len(one_exact_graph(case(torch.device("cpu")))) == 4


def test_loaders_name_what_is_wrong() -> None:
    u, y = torch.zeros(3, 4), torch.zeros(3, 2)
    with pytest.raises(WorkloadError, match="parameters is empty"):
        load_pairs(u[:0], y[:0])
    with pytest.raises(
        WorkloadError, match=r"observations has shape \[3, 2\], expected \[2, any\]"
    ):
        load_pairs(u[:2], y)
    y[1, 1] = float("nan")
    with pytest.raises(WorkloadError, match=r"observations holds 1 values .* first at \[1, 1\]"):
        load_pairs(u, y)
