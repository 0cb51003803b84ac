"""Materials imaging: the microscope against sums of waves, peaks, ridge, ranks, precision."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

import graphopt
from graphopt.examples.common import WorkloadError
from graphopt.examples.materials_imaging.baselines import ridge
from graphopt.examples.materials_imaging.data import (
    APERTURE,
    DEFOCUS,
    DISTANCE,
    Specimens,
    discs,
    make_crystals,
    make_specimens,
    probe,
    propagate,
    record,
    scan_positions,
)
from graphopt.examples.materials_imaging.model import (
    huber_loss,
    published_net,
    relative_error,
    small_net,
)
from graphopt.examples.materials_imaging.peaks import find_peaks, match
from graphopt.examples.materials_imaging.train import case
from tests.examples.contract import one_exact_graph
from tests.support.ranks import on_ranks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the microscope --------------------------------------------------------------------------------


def test_waves_are_sums_over_all_frequencies() -> None:
    """The multislice recursion with Fourier matrices, for one beam position."""
    potential, _ = make_crystals(1, generator())
    row, column = place = scan_positions()[6]
    n = np.arange(32)
    k = np.where(n < 16, n, n - 32) / 32
    fourier = np.exp(-2j * np.pi * np.outer(k, n))
    inverse = np.exp(2j * np.pi * np.outer(n, k)) / 32
    square = k[:, None] ** 2 + k[None] ** 2
    beam = np.zeros((32, 32), complex)
    for i in range(32):
        for j in range(32):
            if square[i, j] < APERTURE**2:
                phase = 2 * np.pi * (k[i] * (n[:, None] - row) + k[j] * (n[None] - column))
                beam += np.exp(1j * (phase - np.pi * DEFOCUS * square[i, j]))
    wave = beam / np.linalg.norm(beam)
    for _ in range(3):
        spectrum = fourier @ (wave * np.exp(1j * potential[0].double().numpy() / 3)) @ fourier.T
        wave = inverse @ (spectrum * np.exp(-1j * np.pi * DISTANCE * square)) @ inverse.T
    actual = propagate(potential, DEFOCUS)[0, scan_positions().index(place)]
    np.testing.assert_allclose(actual.numpy(), wave, atol=2e-6)
    assert float(actual.abs().square().sum()) == pytest.approx(1.0, rel=1e-5)


def _shadow(defocus: float) -> tuple[float, float]:
    """Where an atom at (18, 13) appears in the pattern of the beam at (12, 12), by its contrast."""
    pixels = torch.arange(32.0)
    distance = (pixels[:, None] - 18) ** 2 + (pixels[None] - 13) ** 2
    vacuum, atom = torch.zeros(1, 32, 32), 0.3 * torch.exp(-distance / 4)[None]
    position = scan_positions().index((12, 12))
    seen = [propagate(v, defocus)[0, position] for v in (vacuum, atom)]
    patterns = [torch.fft.fftshift(torch.fft.fft2(w).abs().square()) for w in seen]
    contrast = torch.roll((patterns[1] - patterns[0]).abs(), (12 - 16, 12 - 16), (0, 1))
    weight = contrast.square()
    row = float((weight.sum(1) * pixels).sum() / weight.sum())
    column = float((weight.sum(0) * pixels).sum() / weight.sum())
    return row, column


def test_an_atom_casts_its_shadow_where_it_is_and_upside_down_with_the_opposite_defocus() -> None:
    assert _shadow(DEFOCUS) == pytest.approx((18, 13), abs=1.5)
    assert _shadow(-DEFOCUS) == pytest.approx((24 - 18, 24 - 13), abs=1.5)


def test_without_a_crystal_the_camera_sees_the_aperture() -> None:
    (patterns,) = record(torch.zeros(1, 32, 32), generator())
    inside = torch.fft.fftshift(torch.fft.fft2(probe(DEFOCUS)).abs()) > 1e-3
    row, column = scan_positions()[9]
    seen = torch.roll(patterns[9], (16 - row, 16 - column), (0, 1)) > 0
    assert torch.equal(seen, inside)
    assert 0.9 < int(inside.sum()) / (math.pi * (32 * APERTURE) ** 2) < 1.1


def test_prepared_patterns_are_contrast_within_the_disc() -> None:
    data = make_specimens(8, generator())
    centre = data.patterns.mean(0)
    prepared = data.prepared(centre, 0.5).patterns
    inside = discs().bool().expand_as(prepared)
    assert not prepared[~inside].any()
    torch.testing.assert_close(prepared[inside], 2 * (data.patterns - centre)[inside])
    position = scan_positions().index((12, 12))
    rows, columns = discs()[position].nonzero().double().mean(0).tolist()
    assert (rows, columns) == pytest.approx((12, 12))


def test_crystals_have_their_atoms_at_their_peaks() -> None:
    potential, atoms = make_crystals(32, generator())
    found = match(potential[:, None], atoms)
    assert found.recall > 0.98
    assert found.precision > 0.98
    assert 10 * 32 < found.atoms < 40 * 32


def test_loaders_refuse_by_name() -> None:
    good = make_specimens(2, generator())
    with pytest.raises(WorkloadError, match="potential has shape"):
        Specimens(good.patterns, good.potential[:1], good.atoms)
    with pytest.raises(WorkloadError, match="patterns has shape"):
        Specimens(good.patterns[:, :9], good.potential, good.atoms)
    with pytest.raises(WorkloadError, match="patterns is empty"):
        Specimens(good.patterns[:0], good.potential[:0], good.atoms[:0])
    good.patterns[1, 2, 3, 4] = math.nan
    with pytest.raises(WorkloadError, match=r"patterns holds 1 .*\[1, 2, 3, 4\]"):
        Specimens(good.patterns, good.potential, good.atoms)


# -- scores and baseline ---------------------------------------------------------------------------


def test_peaks_are_found_to_a_fraction_of_a_pixel_and_used_once() -> None:
    pixels = np.arange(32.0)
    places = np.array([[8.3, 9.6], [20.0, 21.4]])
    picture = sum(
        np.exp(-((pixels[:, None] - r) ** 2 + (pixels[None] - c) ** 2) / 2.88) for r, c in places
    )
    np.testing.assert_allclose(find_peaks(picture.astype(np.float32)), places, atol=0.06)
    tensor = torch.tensor(picture, dtype=torch.float32)[None, None]
    off = torch.tensor([[[8.3, 10.5], [8.3, 9.0], [20.0, 22.6], [-9.0, -9.0]]])
    found = match(tensor, off)
    assert (found.atoms, found.peaks, found.matched) == (3, 2, 1)


def test_relative_error_is_one_for_the_mean() -> None:
    potential = torch.rand(3, 1, 32, 32, generator=generator())
    mean = float(potential.mean())
    assert relative_error(torch.full_like(potential, mean), potential, mean) == pytest.approx(1.0)
    assert relative_error(potential, potential, mean) == 0.0


def test_ridge_is_that_of_scikit_learn() -> None:
    train, validation, test = (make_specimens(n, generator(n)) for n in (24, 8, 9))
    found = ridge(train, validation, test)
    other = Ridge(alpha=found["penalty"]).fit(
        train.patterns.flatten(1).double(), train.potential.flatten(1).double()
    )
    predicted = torch.tensor(other.predict(test.patterns.flatten(1).double()))
    expected = relative_error(
        predicted.view_as(test.potential), test.potential, float(train.potential.mean())
    )
    assert found["test"] == pytest.approx(expected, rel=1e-3)


# -- through graphopt ------------------------------------------------------------------------------


def test_published_net() -> None:
    with torch.device("meta"):
        assert published_net()(torch.empty(1, 16, 512, 512)).shape == (1, 1, 512, 512)


def test_gradients_through_graphopt_are_those_of_eager_in_one_graph() -> None:
    one_exact_graph(case(torch.device("cpu")))


def _trained(model: nn.Module, data: Specimens, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = huber_loss(model(data.patterns), data.potential)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_short_training_learns() -> None:
    torch.manual_seed(0)
    data = make_specimens(4, generator())
    losses = _trained(graphopt.optimize(small_net(), backend="eager"), data, 30)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "bound"), [("bf16", 0.05), ("fp16", 0.01)])
def test_convolutions_are_lowered_and_gradients_stay_close(name: str, bound: float) -> None:
    data = make_specimens(1, generator())
    torch.manual_seed(0)
    plain = small_net()
    passes = f"cleanup,precision{{cost=roofline,format={name}}}"
    model: Any = graphopt.optimize(copy.deepcopy(plain), passes=passes, backend="eager")
    for net in (plain, model):
        huber_loss(net(data.patterns), data.potential).backward()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (model, plain)
    )
    difference = float((ours - theirs).norm() / theirs.norm())
    assert 1e-5 < difference < bound
    assert all(p.dtype is torch.float32 for p in model.parameters())


# -- ranks -----------------------------------------------------------------------------------------


def _gradients(model: nn.Module, patterns: Tensor, potential: Tensor) -> list[Tensor]:
    huber_loss(model(patterns), potential).backward()
    return [p.grad for p in model.parameters()]


def _share(rank: int) -> None:
    data = make_specimens(4, generator())
    torch.manual_seed(0)
    whole = _gradients(small_net(), data.patterns, data.potential)
    torch.manual_seed(rank)  # weights become those of rank 0
    model = graphopt.optimize(small_net(), backend="eager")
    mine = slice(rank, None, 2)
    shared = _gradients(model, data.patterns[mine], data.potential[mine])
    for (name, _), a, b in zip(model.named_parameters(), shared, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7, msg=name)
    assert "group_gradients" in model.explain()


@pytest.mark.distributed
def test_two_ranks_have_the_gradients_of_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _share)
