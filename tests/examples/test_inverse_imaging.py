"""Unrolled and other reconstructions: the operator, exact solves, the captured step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import graphopt
from graphopt.examples.common import Run, WorkloadError
from graphopt.examples.common.checkpoint import Checkpoint, read_checkpoint
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.results import Results
from graphopt.examples.inverse_imaging import train
from graphopt.examples.inverse_imaging.classical import plug_and_play, psnr, smoothed
from graphopt.examples.inverse_imaging.data import (
    HELD_OUT,
    TEST,
    TRAIN,
    cut,
    draw_operator,
    load_pictures,
    measure,
)
from graphopt.examples.inverse_imaging.model import (
    BackProjectionUNet,
    DeepImagePrior,
    Denoiser,
    MoDL,
)
from graphopt.examples.inverse_imaging.operators import adjoint, conjugate_gradients, observe
from tests.examples.contract import one_exact_graph

SIDE = 6


def _small() -> tuple[Tensor, Tensor, np.ndarray]:
    """Transfer function and mask of an operator on small pictures, and its matrix."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    mask = (torch.rand(SIDE, SIDE, generator=generator) < 0.6).double()
    transfer = torch.fft.rfft2(kernel / kernel.sum(), s=(SIDE, SIDE))
    return transfer, mask, _dense((kernel / kernel.sum()).numpy(), mask.numpy())


def _dense(kernel: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A as a matrix, entry by entry from its definition."""
    matrix = np.zeros((SIDE * SIDE, SIDE * SIDE))
    for i in range(SIDE):
        for j in range(SIDE):
            for a in range(3):
                for b in range(3):
                    source = ((i - a) % SIDE) * SIDE + (j - b) % SIDE
                    matrix[i * SIDE + j, source] += mask[i, j] * kernel[a, b]
    return matrix


def _pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().numpy().reshape(len(x), -1)


def test_the_operator_and_its_adjoint_are_a_matrix_and_its_transpose() -> None:
    transfer, mask, dense = _small()
    x = _pictures(4)
    np.testing.assert_allclose(_flat(observe(x, transfer, mask)), _flat(x) @ dense.T, atol=1e-14)
    np.testing.assert_allclose(_flat(adjoint(x, transfer, mask)), _flat(x) @ dense, atol=1e-14)


def test_conjugate_gradients_solve_and_differentiate_as_a_dense_solve() -> None:
    transfer, mask, dense = _small()
    system = dense.T @ dense + 0.1 * np.eye(SIDE**2)
    target, weights = _pictures(3).requires_grad_(), _pictures(3).flip(0)

    def apply(x: Tensor) -> Tensor:
        return adjoint(observe(x, transfer, mask), transfer, mask) + 0.1 * x

    solved = conjugate_gradients(apply, target, torch.zeros_like(target), SIDE**2)
    np.testing.assert_allclose(_flat(solved), np.linalg.solve(system, _flat(target).T).T, atol=1e-9)
    (weights * solved).sum().backward()
    assert target.grad is not None
    wanted = np.linalg.solve(system, _flat(weights).T).T  # the system is symmetric
    np.testing.assert_allclose(_flat(target.grad), wanted, atol=1e-6)


def test_solved_samples_of_a_batch_stay_where_they_are() -> None:
    target = torch.cat([torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)])
    found = conjugate_gradients(lambda x: 2 * x, target, torch.zeros_like(target), 5)
    assert torch.equal(found, target / 2)


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def test_modl_is_its_recursion_with_dense_solves() -> None:
    transfer, mask, dense = _small()
    y = _pictures(2) * mask
    model = MoDL(Halve(), steps=3, iterations=SIDE**2, weight=0.2).double()
    system = dense.T @ dense + 0.2 * np.eye(SIDE**2)
    back = _flat(y) @ dense
    x = np.linalg.solve(system, back.T).T
    for _ in range(3):
        x = np.linalg.solve(system, (back + 0.2 * 0.5 * x).T).T
    np.testing.assert_allclose(_flat(model(y, transfer, mask)), x, atol=1e-6)


def test_plug_and_play_with_a_linear_denoiser_ends_at_its_fixed_point() -> None:
    """D(v) = v/2 is the proximal map of |x|^2 rho/2: the limit is a Tikhonov solution."""
    transfer, mask, dense = _small()
    y = 0.4 * _pictures(2) * mask
    found = plug_and_play(y, transfer, mask, Halve(), 0.3, iterations=400)
    wanted = np.linalg.solve(dense.T @ dense + 0.3 * np.eye(SIDE**2), (_flat(y) @ dense).T).T
    np.testing.assert_allclose(_flat(found), wanted.clip(0, 1), atol=1e-6)


def test_smoothing_solves_its_normal_equations() -> None:
    transfer, mask, dense = _small()
    y = _pictures(2) * mask
    rough = np.zeros((SIDE**2, SIDE**2))
    for i in range(SIDE):
        for j in range(SIDE):
            for a, b in ((i + 1, j), (i, j + 1)):
                edge = np.zeros(SIDE**2)
                edge[i * SIDE + j] += 1
                edge[(a % SIDE) * SIDE + b % SIDE] -= 1
                rough += np.outer(edge, edge)
    wanted = np.linalg.solve(dense.T @ dense + 0.05 * rough, (_flat(y) @ dense).T).T
    np.testing.assert_allclose(_flat(smoothed(y, transfer, mask, 0.05)), wanted, atol=1e-9)


def test_psnr_of_a_known_error() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    np.testing.assert_allclose(psnr(x + 0.1, x), [20.0, 20.0], rtol=1e-5)


@pytest.mark.parametrize("kind", [BackProjectionUNet, MoDL])
def test_a_short_training_gains_decibels(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    operator = draw_operator(generator)
    x = load_pictures(("coins.png",), 8)
    y = measure(x, operator, generator)
    model = MoDL(Denoiser(8), steps=2, iterations=3) if kind is MoDL else BackProjectionUNet(8)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    graphopt.optimize(model, backend="eager")
    before = float(psnr(model(y, *operator), x).mean().detach())
    for _ in range(25):
        optimizer.zero_grad()
        F.mse_loss(model(y, *operator), x).backward()
        optimizer.step()
    assert float(psnr(model(y, *operator), x).mean().detach()) > before + 1.0


def test_deep_image_prior_fits_the_observation_only() -> None:
    torch.manual_seed(0)
    transfer, mask = draw_operator(torch.Generator().manual_seed(0))
    model, z = DeepImagePrior(4), torch.rand(1, 4, 32, 32)
    assert torch.equal(model(z, transfer, mask), observe(model.picture(z), transfer, mask))
    assert not model(z, transfer, mask)[0, 0][mask == 0].any()


def _run(checkpoint: Checkpoint, folder: Path) -> Run:
    return Run(
        checkpoint=checkpoint,
        results=Results("inverse_imaging", {"seed": 0, "epochs": 1, "backend": "none"}),
        output=folder,
        device=torch.device("cpu"),
        console=Console(quiet=True),
        interrupts=Interrupts(),
    )


def test_a_resumed_run_finds_every_picture_of_the_prior_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One network is fitted to observation after observation; each keeps its own weights."""
    monkeypatch.setattr(train, "PRIOR_STEPS", 3)
    operator = draw_operator(torch.Generator().manual_seed(0))
    seen = [torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32)]
    fits = train.PriorFits(_run(Checkpoint({}), tmp_path))
    before = [fits(str(number), y, operator) for number, y in enumerate(seen)]
    fits = train.PriorFits(_run(read_checkpoint(tmp_path / "checkpoint.pt", {}), tmp_path))
    after = [fits(str(number), y, operator) for number, y in enumerate(seen)]
    assert not torch.equal(before[0], before[1])
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours, theirs)


def test_the_step_of_the_case_is_one_exact_graph() -> None:
    assert len(one_exact_graph(train.case(torch.device("cpu")))) == 9


def test_no_picture_is_in_two_parts() -> None:
    assert len({*TRAIN, *HELD_OUT, *TEST}) == len(TRAIN) + len(HELD_OUT) + len(TEST)


def test_loaders_name_what_is_wrong() -> None:
    good = load_pictures(("coins.png",))
    assert good.shape[1:] == (1, 32, 32)
    assert 0 <= float(good.min()) < float(good.max()) <= 1
    with pytest.raises(WorkloadError, match="crops of flat with contrast is empty"):
        cut(torch.zeros(64, 64), "flat")
    with pytest.raises(WorkloadError, match=r"colour has shape \[64, 64, 3\]"):
        cut(torch.zeros(64, 64, 3), "colour")
    bad = torch.zeros(64, 64)
    bad[3, 4] = float("nan")
    with pytest.raises(WorkloadError, match=r"bad holds 1 values .* first at \[3, 4\]"):
        cut(bad, "bad")
    with pytest.raises(WorkloadError, match=r"nowhere\.png does not exist"):
        load_pictures(("nowhere.png",))
