"""K-pairwise models against enumeration by loops, and their steps through the compiler."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import graphopt
from graphopt.examples.common import Run, WorkloadError
from graphopt.examples.common.checkpoint import Checkpoint
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.results import Results
from graphopt.examples.neural_populations import analysis, fit
from graphopt.examples.neural_populations.data import check_raster, population
from graphopt.examples.neural_populations.exact import exact_heat_capacity, fit_exact
from graphopt.examples.neural_populations.independent import Independent
from graphopt.examples.neural_populations.model import GibbsSweep, KPairwise, moments
from graphopt.examples.neural_populations.train import case
from graphopt.model.surface import report
from tests.examples.contract import one_exact_graph

N, CHAINS = 7, 3000
WORDS = np.array(list(itertools.product([0, 1], repeat=N)))  # all of them


@pytest.fixture
def model() -> KPairwise:
    random = torch.Generator().manual_seed(3)
    model = KPairwise(N, last=4)
    with torch.no_grad():
        model.fields.copy_(torch.randn(N, generator=random) - 1)
        model.upper.copy_(torch.randn(N, N, generator=random))
        model.free.copy_(torch.tensor([0.5, -0.5, 1.0, 2.0]))
    return model


def _energies(model: KPairwise) -> np.ndarray:
    """By the formula, one word after the other; words in the order of WORDS."""
    h, upper = model.fields.tolist(), model.upper.tolist()
    v = [0.0, 0.5, -0.5, 1.0, 2.0, 2.0, 2.0, 2.0]
    energies = []
    for word in WORDS:
        on = np.flatnonzero(word)
        pairs = sum(upper[i][j] for i, j in itertools.combinations(on, 2))
        energies.append(v[len(on)] - sum(h[i] for i in on) - pairs)
    return np.array(energies)


def _probabilities(energies: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(-energies / temperature)
    return weights / weights.sum()


def _raster() -> Tensor:
    return torch.tensor(WORDS.T, dtype=torch.float32)


def _histogram(samples: Tensor) -> np.ndarray:
    numbers = (samples.T.long().numpy() * 2 ** np.arange(N)[::-1]).sum(1)
    return np.bincount(numbers, minlength=2**N) / len(numbers)


def _run(tmp_path: Path) -> Run:
    settings = {"seed": 0, "epochs": 1, "backend": "none"}
    return Run(
        checkpoint=Checkpoint(settings),
        results=Results("test", settings),
        output=tmp_path,
        device=torch.device("cpu"),
        console=Console(quiet=True),
        interrupts=Interrupts(),
    )


def test_energy_and_odds(model: KPairwise) -> None:
    """The log-odds of a neuron are the difference of two energies."""
    energies = _energies(model)
    with torch.no_grad():
        assert np.allclose(model.energy(_raster()).numpy(), energies, atol=1e-5)
        odds = model(_raster()).numpy()
    for w, word in enumerate(WORDS):
        for i in range(N):
            off, on = word.copy(), word.copy()
            off[i], on[i] = 0, 1
            e = [energies[int("".join(map(str, x)), 2)] for x in (off, on)]
            assert odds[i, w] == pytest.approx(e[0] - e[1], abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sweeps_draw_from_the_distribution(model: KPairwise, temperature: float) -> None:
    """Within four standard errors of the distance that as many independent words would have."""
    random, sweep = torch.Generator().manual_seed(0), GibbsSweep(model)
    states, kept = torch.zeros(N, CHAINS), []
    with torch.no_grad():
        for number in range(130):
            noise = torch.rand(N, CHAINS, generator=random)
            states, found = sweep(states, noise, torch.full((CHAINS,), temperature))
            if number >= 30 and number % 5 == 0:
                kept.append(states)
    p = _probabilities(_energies(model), temperature)
    samples = torch.cat(kept, 1)
    chi = ((_histogram(samples) - p) ** 2 / p).sum() * samples.shape[1]
    assert chi < len(p) + 4 * math.sqrt(2 * len(p))
    assert found.counts.sum().item() == pytest.approx(1)
    assert torch.equal(found.means, states.mean(1))
    assert torch.allclose(found.pairs.diagonal(), found.means)


def test_entropy_by_two_ways(model: KPairwise) -> None:
    energies = _energies(model)
    p = _probabilities(energies)
    expected = float(-(p * np.log2(p)).sum())
    random, sweep = torch.Generator().manual_seed(1), GibbsSweep(model)
    start = analysis.sample(sweep, torch.zeros(N, CHAINS), random, sweeps=30, every=30)
    samples = analysis.sample(sweep, start, random, sweeps=150, every=3)
    entropy, log_z = analysis.entropy(model, samples)
    assert entropy == pytest.approx(expected, rel=0.01)
    assert log_z == pytest.approx(float(np.log(np.exp(-energies).sum())), abs=0.02)
    grid, capacity = analysis.heat_capacity(model, sweep, start, random, burn_in=50, sweeps=200)
    exact = exact_heat_capacity(energies, grid.double().numpy())
    warm = grid.numpy() > 0.4  # these couplings are random: colder chains are frozen
    assert np.abs(capacity.numpy() - exact)[warm].max() < 0.08 * exact.max()
    assert analysis.integrated_entropy(grid, torch.from_numpy(exact)) == pytest.approx(
        expected, rel=0.01
    )


def test_descent_finds_all_metastable_states(model: KPairwise) -> None:
    energies = _energies(model)
    flips = 2 ** np.arange(N)
    minima = {w for w in range(2**N) if all(energies[w] <= energies[w ^ f] for f in flips)}
    assert len(minima) > 1
    states, basins = analysis.modes(model, _raster())
    found = {int("".join(str(int(x)) for x in column), 2) for column in states.T.tolist()}
    assert found == minima
    assert basins.sum().item() == pytest.approx(1)


def test_statistics_are_the_gradient_of_the_energy(model: KPairwise) -> None:
    """And `vector` and `assign` keep their order."""
    words = _raster()[:, ::3]
    model.energy(words).mean().backward()
    index = torch.triu_indices(N, N, 1)
    assert model.upper.grad is not None
    gradient = torch.cat([model.fields.grad, model.upper.grad[index[0], index[1]], model.free.grad])
    assert torch.allclose(model.statistics(moments(words)), -gradient, atol=1e-6)
    rows = torch.stack([model.statistics(moments(words[:, [i]])) for i in range(words.shape[1])], 1)
    assert torch.allclose(fit.covariance(model, words), rows.double().cov(correction=0), atol=1e-6)
    twin = KPairwise(N, last=4)
    twin.assign(model.vector())
    assert torch.equal(twin(words), model(words))


def test_independent_neurons() -> None:
    random = torch.Generator().manual_seed(2)
    alone = Independent((torch.rand(N, 500, generator=random) < 0.3).float())
    rates = alone.rates.numpy()
    p = np.prod(np.where(WORDS, rates, 1 - rates), 1)
    counts = np.bincount(WORDS.sum(1), p, N + 1)
    assert np.allclose(alone.synchrony().numpy(), counts)
    assert alone.entropy == pytest.approx(float(-(p * np.log2(p)).sum()))
    assert np.allclose(alone.bits(_raster()).sum(0).numpy(), np.log2(p))


def test_fit_reaches_the_exact_maximum(tmp_path: Path) -> None:
    """From pseudo-likelihood and 150 sweeps; enumeration gives what there is to reach."""
    words = population(10, 5000, torch.Generator().manual_seed(5), strength=2.35).train
    last = fit.last_resolved(words)
    model, run = KPairwise(10, last), _run(tmp_path)
    losses = fit.fit_pseudo_likelihood(run, "first", model, words, 60, 0)
    assert losses[-1] < 0.97 * losses[0]
    states = fit.fit_moments(run, "second", model, words, 150, 1000)
    precision = np.zeros(10 + 45 + last)
    precision[10:55] = fit.COUPLING_PRECISION / 5000
    precision[55:] = fit.POTENTIAL_PRECISION / 5000
    exact = fit_exact(words.T.double().numpy(), last, precision)
    random = torch.Generator().manual_seed(6)
    samples = analysis.sample(GibbsSweep(model), states, random, sweeps=90, every=3)
    data = analysis.synchrony(words)
    assert np.abs(exact.synchrony - data.numpy()).max() < 1e-3  # P(K) is a constraint
    assert analysis.entropy(model, samples)[0] == pytest.approx(exact.entropy, rel=0.01)
    alone = analysis.jensen_shannon(Independent(words).synchrony(), data)
    assert analysis.jensen_shannon(analysis.synchrony(samples), data) < 0.02 * alone


def test_gradients_are_those_of_pytorch() -> None:
    found = one_exact_graph(case(torch.device("cpu")))
    assert found["upper"].abs().max() > 0


def test_sweep_is_one_graph(model: KPairwise) -> None:
    """Parameters that change between sweeps do not capture anew."""
    random = torch.Generator().manual_seed(0)
    plain = GibbsSweep(model)
    sweep = graphopt.optimize(GibbsSweep(model), backend="eager")
    states = torch.zeros(N, 50)
    with torch.no_grad():
        for _ in range(4):
            inputs = states, torch.rand(N, 50, generator=random), torch.ones(50)
            states, found = sweep(*inputs)
            expected = plain(*inputs)
            assert torch.equal(states, expected[0])
            assert all(torch.equal(a, b) for a, b in zip(found, expected[1], strict=True))
            model.fields += 0.3
    captured = report(sweep)
    assert len(captured.specialisations) == 1
    assert not captured.plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (torch.zeros(5, 0), "rates of retina is empty"),
        (torch.zeros(5), "rates of retina has shape"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0], [1.0, 0.0]]), "1 values that are NaN"),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]]), "neither 0 nor 1, the first at"),
        (torch.zeros(2, 9), "has 2 neurons, expected 3"),
    ],
)
def test_bad_rasters_are_named(words: Tensor, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        check_raster("rates of retina", words)


def test_population_has_the_correlation_it_promises() -> None:
    for strength, expected in ((1.0, 0.035), (2.35, 0.10)):
        words = population(40, 20_000, torch.Generator().manual_seed(0), strength=strength).train
        found = torch.corrcoef(words)[tuple(torch.triu_indices(40, 40, 1))].mean()
        assert found.item() == pytest.approx(expected, rel=0.15)
    with pytest.raises(WorkloadError, match="no own noise"):
        population(40, 10, torch.Generator(), strength=3.1)
