"""The same model by enumeration of all 2^N words, for small N: NumPy alone, nothing of `model`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_LARGEST = 16


class Exact(NamedTuple):
    """A fitted distribution.

    Attributes:
        parameters: h, J_ij for i < j, V_1 ... V_last.
        entropy: bits.
        log_z: with E(silence) = 0, nats.
        energies: of all words, shape [2^N].
        synchrony: P(K), shape [N + 1].
    """

    parameters: Array
    entropy: float
    log_z: float
    energies: Array
    synchrony: Array


def all_words(neurons: int) -> Array:
    """Shape [2^N, N]; row w holds the binary digits of w."""
    if neurons > _LARGEST:
        raise ValueError(f"2^{neurons} words are too many; enumerate {_LARGEST} neurons at most")
    return ((np.arange(2**neurons)[:, None] >> np.arange(neurons)) & 1).astype(float)


def features(words: Array, last: int) -> Array:
    """s_i, s_i s_j for i < j, -[K = 1] ... -[K ≥ last], shape [words, features]."""
    i, j = np.triu_indices(words.shape[1], 1)
    count = np.minimum(words.sum(1), last) if last else words.sum(1)
    levels = -(count[:, None] == np.arange(1, last + 1)).astype(float)
    return np.concatenate([words, words[:, i] * words[:, j], levels], 1)


def distribution(neurons: int, last: int, parameters: Array) -> Exact:
    """Of given parameters."""
    words = all_words(neurons)
    energies = -features(words, last) @ parameters
    log_z = float(np.logaddexp.reduce(-energies))
    p = np.exp(-energies - log_z)
    entropy = float(p @ (energies + log_z) / np.log(2))
    synchrony = np.bincount(words.sum(1).astype(int), p, neurons + 1).astype(float)
    return Exact(parameters, entropy, log_z, energies, synchrony)


def fit_exact(
    words: Array, last: int, precision: Array, *, steps: int = 60, tolerance: float = 1e-10
) -> Exact:
    """Maximise mean log-likelihood - ½ Σ precision θ² by Newton's method with step halving.

    Args:
        words: data, shape [words, N].
        last: the largest K with a potential of its own.
        precision: of the Gaussian prior of each parameter, per word.
        steps: at most.
        tolerance: of the squared Newton decrement at which to stop.
    """
    neurons = words.shape[1]
    table, target = features(all_words(neurons), last), features(words, last).mean(0)
    theta = np.zeros(table.shape[1])
    theta[:neurons] = np.log(words.mean(0) / (1 - words.mean(0)))

    def objective(at: Array) -> float:
        log_z = np.logaddexp.reduce(table @ at)
        return float(target @ at - log_z - 0.5 * precision @ at**2)

    for _ in range(steps):
        score = table @ theta
        p = np.exp(score - np.logaddexp.reduce(score))
        mean = p @ table
        gradient = target - mean - precision * theta
        curvature = (table * p[:, None]).T @ table - np.outer(mean, mean) + np.diag(precision)
        direction = np.linalg.lstsq(curvature, gradient, rcond=1e-12)[0]
        decrement = float(gradient @ direction)
        if decrement < tolerance:
            return distribution(neurons, last, theta)
        size = 1.0
        while objective(theta + size * direction) < objective(theta) and size > 1e-6:
            size /= 2
        theta = theta + size * direction
    raise RuntimeError(f"Newton's method has not converged in {steps} steps")


def exact_heat_capacity(energies: Array, temperatures: Array) -> Array:
    """Var(E) / T² of P ∝ exp(-E / T), at each temperature."""
    found = []
    for t in temperatures:
        p = np.exp(-energies / t - np.logaddexp.reduce(-energies / t))
        found.append((p @ energies**2 - (p @ energies) ** 2) / t**2)
    return np.array(found)
