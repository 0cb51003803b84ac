"""What a fitted model says: samples, entropy by two ways, synchrony, neurons, metastable states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.examples.neural_populations.model import KPairwise

LN2 = 0.6931471805599453
Sweep = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, object]]


@torch.no_grad()
def sample(
    sweep: Sweep, states: Tensor, generator: torch.Generator, *, sweeps: int, every: int
) -> Tensor:
    """Words at T = 1: every ``every``-th state of all chains, shape [N, C * (sweeps // every)]."""
    kept = []
    ones = torch.ones(states.shape[1], device=states.device)
    for number in range(1, sweeps + 1):
        noise = torch.rand(states.shape, generator=generator).to(states.device)
        states = sweep(states, noise, ones)[0]
        if number % every == 0:
            kept.append(states)
    return torch.cat(kept, 1)


@torch.no_grad()
def entropy(model: KPairwise, samples: Tensor) -> tuple[float, float]:
    """Entropy in bits, and log Z in nats.

    Silence has E = 0, so its probability is 1 / Z; S = <E> + log Z.
    """
    log_z = -(samples.sum(0) == 0).double().mean().log()
    return float((model.energy(samples).double().mean() + log_z) / LN2), float(log_z)


@torch.no_grad()
def heat_capacity(
    model: KPairwise,
    sweep: Sweep,
    states: Tensor,
    generator: torch.Generator,
    *,
    temperatures: int = 30,
    burn_in: int = 100,
    sweeps: int = 400,
) -> tuple[Tensor, Tensor]:
    """C(T) = Var(E) / T², with the chains divided among temperatures up to 1.

    Args:
        model: gives the energies.
        sweep: of the model.
        states: drawn at T = 1, shape [N, C], C a multiple of ``temperatures``.
        generator: of the noise.
        temperatures: how many.
        burn_in: sweeps that are not used.
        sweeps: that are.

    Returns:
        Temperatures and heat capacities in nats, each of shape [temperatures].
    """
    grid = torch.arange(1, temperatures + 1, device=states.device) / temperatures
    each = grid.repeat_interleave(states.shape[1] // temperatures)
    total = torch.zeros(2, temperatures, dtype=torch.float64, device=states.device)
    for number in range(burn_in + sweeps):
        noise = torch.rand(states.shape, generator=generator).to(states.device)
        states = sweep(states, noise, each)[0]
        if number >= burn_in:
            e = model.energy(states).double().view(temperatures, -1)
            total += torch.stack([e.mean(1), e.square().mean(1)]) / sweeps
    return grid, (total[1] - total[0].square()) / grid.double().square()


def integrated_entropy(temperatures: Tensor, capacity: Tensor) -> float:
    """S(1) = ∫_0^1 C(T) / T dT in bits, by the trapezoidal rule from C = 0 at T = 0."""
    ratio = torch.cat([capacity.new_zeros(1), capacity / temperatures.to(capacity)])
    grid = torch.cat([capacity.new_zeros(1), temperatures.to(capacity)])
    return float(torch.trapezoid(ratio, grid)) / LN2


def synchrony(words: Tensor) -> Tensor:
    """P(K) of a raster, shape [N + 1]."""
    counts = torch.bincount(words.sum(0).long().cpu(), minlength=len(words) + 1)
    return counts.double() / words.shape[1]


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Divergence between two distributions, in bits, between 0 and 1."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log2(), 0.0).nansum()

    middle = (p + q) / 2
    return float(kl(p, middle) + kl(q, middle)) / 2


def triplets(words: Tensor) -> Tensor:
    """Third central moments <δσ_i δσ_j δσ_k> of all i < j < k."""
    n = len(words)
    centred = words - words.mean(1, keepdim=True)
    moments = torch.stack([(centred * row) @ centred.T for row in centred]) / words.shape[1]
    i, j, k = torch.combinations(torch.arange(n, device=words.device), 3).unbind(1)
    return moments[i, j, k]


@torch.no_grad()
def bits_per_word(model: KPairwise, log_z: float, words: Tensor) -> float:
    """Mean log-likelihood of words, in bits."""
    return (-float(model.energy(words).double().mean()) - log_z) / LN2


@torch.no_grad()
def modes(model: KPairwise, words: Tensor) -> tuple[Tensor, Tensor]:
    """Metastable states: where descent from words ends, one flip at a time, each the steepest.

    Returns:
        The states, shape [N, M], and the fraction of words that end in each, in falling order.
    """
    states = words.clone()
    columns = torch.arange(words.shape[1], device=words.device)
    while True:
        odds = model(states)
        gain = torch.where(states > 0, -odds, odds)  # of log-probability, by a flip
        best, neuron = gain.max(0)
        if not bool((best > 0).any()):
            break
        old = states[neuron, columns]
        states[neuron, columns] = torch.where(best > 0, 1 - old, old)
    found, counts = torch.unique(states, dim=1, return_counts=True)
    order = counts.argsort(descending=True)
    return found[:, order], counts[order].double() / words.shape[1]


def calibration(odds: Tensor, words: Tensor, bins: int = 20) -> tuple[Tensor, Tensor]:
    """Mean log-odds and fraction of spikes in bins of equal size, shape [bins] each."""
    order = odds.flatten().argsort()
    parts = zip(odds.flatten()[order].chunk(bins), words.flatten()[order].chunk(bins), strict=True)
    means = torch.tensor([[float(x.mean()), float(y.mean())] for x, y in parts])
    return means[:, 0], means[:, 1]
