"""Tikhonov inversion without networks, in NumPy: in closed form, and by Gauss-Newton."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """The map from y to ``offset + matrix @ (y - centre)``."""

    matrix: Array
    centre: Array
    offset: Array

    def __call__(self, y: Array) -> Array:
        """Of observations (samples, observed)."""
        return self.offset + (y - self.centre) @ self.matrix.T


def tikhonov(G: Array, gamma: Array, mean: Array, noise: float, alpha: float = 1.0) -> Affine:
    """The minimiser of ||y - Gu||^2/noise^2 + alpha ||u - mean||^2 in the norm of 1/gamma."""
    gain = gamma @ G.T @ np.linalg.inv(G @ gamma @ G.T + alpha * noise**2 * np.eye(len(G)))
    return Affine(gain, G @ mean, mean)


def affine_ndnn(u: Array, y: Array) -> Affine:
    """Least squares of u (samples, cells) on y (samples, observed), of least norm."""
    centred = y - y.mean(0)
    return Affine((np.linalg.pinv(centred) @ (u - u.mean(0))).T, y.mean(0), u.mean(0))


def affine_tnet(y: Array, inverse: Affine) -> Affine:
    """Where the Tikhonov functional of all observations is least: ``inverse`` on their span."""
    centred = y - y.mean(0)
    onto = np.linalg.pinv(centred) @ centred
    return Affine(inverse.matrix @ onto, y.mean(0), inverse(y.mean(0)))


def affine_mcdnn(u: Array, y: Array, G: Array, gamma: Array, noise: float, alpha: float) -> Affine:
    """Tikhonov around the prediction of the affine nDNN, on the span of the observations."""
    naive = affine_ndnn(u, y)
    precision = np.linalg.inv(gamma)
    scaled = alpha / noise**2 * G.T
    solve = np.linalg.inv(precision + scaled @ G)
    centred = y - y.mean(0)
    onto = np.linalg.pinv(centred) @ centred
    matrix = solve @ (precision @ naive.matrix + scaled @ onto)
    return Affine(matrix, y.mean(0), solve @ (precision @ naive.offset + scaled @ y.mean(0)))


class HeatInversion:
    """Gauss-Newton for the conductivity of the plate of `problems.HeatConduction`.

    Works on one observation at a time. The Jacobian comes from one Cholesky factorisation and an
    adjoint solve per observed cell.

    Args:
        side: cells along an edge.
        observed: their numbers.
        root: symmetric square root of the prior's covariance, (cells, cells).
        mean: of the prior, (cells,).
        noise: standard deviation of the observations.
    """

    def __init__(
        self, side: int, observed: NDArray[np.int64], root: Array, mean: Array, noise: float
    ) -> None:
        self.observed, self.root, self.mean, self.noise = observed, root, mean, noise
        self.cells = side * side
        grid = np.arange(self.cells).reshape(side, side)
        self.first = np.concatenate([grid[:, :-1].ravel(), grid[:-1].ravel()])
        self.second = np.concatenate([grid[:, 1:].ravel(), grid[1:].ravel()])
        self.cooled = grid[:, 0]
        inner = len(self.first)
        faces = np.arange(inner)
        self.gradient = np.zeros((inner + side, self.cells))
        self.gradient[faces, self.first] = 1.0
        self.gradient[faces, self.second] = -1.0
        self.gradient[inner + np.arange(side), self.cooled] = 1.0

    def linearise(self, v: Array) -> tuple[Array, Array]:
        """Temperatures (observed,) and their Jacobian (observed, cells) in whitened v (cells,)."""
        k = np.exp(self.mean + self.root @ v)
        ka, kb = k[self.first], k[self.second]
        faces = np.concatenate([2 * ka * kb / (ka + kb), 2 * k[self.cooled]])
        factor = cho_factor(self.gradient.T @ (faces[:, None] * self.gradient), check_finite=False)
        columns = np.zeros((self.cells, 1 + len(self.observed)))
        columns[:, 0] = 1 / self.cells
        columns[self.observed, 1 + np.arange(len(self.observed))] = 1.0
        solved = cho_solve(factor, columns, check_finite=False)
        drops = self.gradient @ solved
        by_face = -(drops[:, 1:] * drops[:, :1]).T
        inner = len(self.first)
        by_cell = np.zeros((len(self.observed), self.cells))
        share = faces[:inner] * by_face[:, :inner]
        np.add.at(by_cell.T, self.first, (share * (kb / (ka + kb))).T)
        np.add.at(by_cell.T, self.second, (share * (ka / (ka + kb))).T)
        np.add.at(by_cell.T, self.cooled, (faces[inner:] * by_face[:, inner:]).T)
        return solved[self.observed, 0], by_cell @ self.root

    def __call__(self, y: Array, tolerance: float = 1e-4, limit: int = 50) -> tuple[Array, int]:
        """The minimiser u (cells,) for y (observed,), and how many steps it took.

        Stops when a step lowers the functional by less than ``tolerance`` of it.
        """
        v = np.zeros(self.cells)
        seen, jacobian = self.linearise(v)
        value = self._functional(y, seen, v)
        for steps in range(1, limit + 1):  # noqa: B007
            # With fewer observations than cells, the small system is the one over observations.
            scaled = jacobian / self.noise
            residual = (y - seen) / self.noise + scaled @ v
            target = scaled.T @ np.linalg.solve(scaled @ scaled.T + np.eye(len(y)), residual)
            length = 1.0
            while True:
                trial = v + length * (target - v)
                seen, jacobian = self.linearise(trial)
                lowered = self._functional(y, seen, trial)
                if lowered <= value or length < 1e-3:
                    break
                length /= 2
            done = value - lowered < tolerance * value
            v, value = trial, lowered
            if done:
                break
        return self.mean + self.root @ v, steps

    def _functional(self, y: Array, seen: Array, v: Array) -> float:
        return float(0.5 * np.sum(((y - seen) / self.noise) ** 2) + 0.5 * v @ v)
