"""Linear estimators: two that learn a matrix or a filter from the pairs, one that is told T."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.examples.unknown_operator.data import NOISE, POINTS, Pairs, transfer

_RIDGES = torch.logspace(-4, 2, 25, dtype=torch.float64)


def mean_square(estimate: Tensor, signal: Tensor) -> float:
    """Squared error per point."""
    return float((estimate - signal).double().square().mean())


class Dense:
    """A full matrix and an offset by ridge regression; the ridge is the best on validation pairs.

    Args:
        train: pairs that determine the matrix.
        validation: pairs that determine the ridge.
    """

    def __init__(self, train: Pairs, validation: Pairs) -> None:
        x, y = (t.double().flatten(1) for t in train)
        self._x_mean, self._y_mean = x.mean(0), y.mean(0)
        x, y = x - self._x_mean, y - self._y_mean
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        cross = vectors.T @ (x.T @ y / len(x))
        candidates = [vectors @ (cross / (values.clamp(min=0) + r)[:, None]) for r in _RIDGES]
        errors = []
        for self.matrix in candidates:
            errors.append(mean_square(self(validation.observed), validation.signal))
        best = min(range(len(errors)), key=errors.__getitem__)
        self.matrix, self.ridge = candidates[best], float(_RIDGES[best])

    def __call__(self, observed: Tensor) -> Tensor:
        """Estimates, shape [count, 1, POINTS]."""
        centred = observed.double().flatten(1) - self._x_mean
        estimate: Tensor = centred @ self.matrix + self._y_mean
        return estimate.view(observed.shape)


class Filter:
    """A circular convolution by least squares: linear, but the same at all places, as the U-net is.

    Args:
        train: pairs that determine it.
    """

    def __init__(self, train: Pairs) -> None:
        y, f = (torch.fft.rfft(t.double()) for t in train)
        self.gain = (y.conj() * f).mean((0, 1)) / y.abs().square().mean((0, 1))

    def __call__(self, observed: Tensor) -> Tensor:
        """Estimates, shape [count, 1, POINTS]."""
        return _filtered(observed, self.gain)


class Wiener:
    r"""The best linear estimator of stationary signals, for a known operator and spectrum.

    .. math:: \hat f_k = \bar t_k S_k (|t_k|^2 S_k + N)^{-1} y_k

    with the transfer function t, and the power of signals S and of noise N in each Fourier
    coefficient.

    Args:
        examples: of signals, many, shape [count, 1, POINTS]; their spectrum is S.
    """

    def __init__(self, examples: Tensor) -> None:
        power = torch.fft.rfft(examples.double()).abs().square().mean((0, 1))
        t = transfer()
        self.gain = t * power / (t.square() * power + POINTS * NOISE**2)

    def __call__(self, observed: Tensor) -> Tensor:
        """Estimates, shape [count, 1, POINTS]."""
        return _filtered(observed, self.gain)


def _filtered(observed: Tensor, gain: Tensor) -> Tensor:
    estimate: Tensor = torch.fft.irfft(torch.fft.rfft(observed.double()) * gain, n=POINTS)
    return estimate
