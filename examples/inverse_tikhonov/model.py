r"""Networks that invert a forward map: nDNN, mcDNN and TNet.

A parameter u (prior N(u0, Gamma)) is seen through y = G(u) + noise, noise ~ N(0, sigma^2 I). With
||x||^2_M = x^T M x, training minimises the mean over samples of

* nDNN, the naive network: 1/2 ||u - Psi(y)||^2_{1/Gamma},
* mcDNN, model-constrained: nDNN + alpha/2 ||y - G(Psi(y))||^2 / sigma^2,
* TNet: 1/2 ||y - G(Psi(y))||^2 / sigma^2 + alpha/2 ||Psi(y) - u0||^2_{1/Gamma}.

TNet never sees a true u: its loss is the Tikhonov functional of each observation, so the network
learns what an iterative solver would find. All networks put out the whitened v of
u = u0 + Gamma^{1/2} v; in v, the norm with 1/Gamma is the Euclidean one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GaussianPrior(nn.Module):
    r"""N(u0, Gamma) with Gamma^{1/2} = s (I - l^2 Laplacian)^{-1}, the Laplacian with zero flux.

    Args:
        cells: how many along each axis of the unit interval or square.
        length: correlation length l.
        deviation: of u, averaged over cells.
        mean: u0, the same everywhere.
    """

    mean: Tensor
    root: Tensor
    inverse_root: Tensor

    def __init__(
        self, cells: tuple[int, ...], length: float, deviation: float, mean: float = 0.0
    ) -> None:
        super().__init__()
        size = 1
        laplacian = torch.zeros(1, 1, dtype=torch.float64)
        for count in cells:
            chain = _chain_laplacian(count)
            laplacian = torch.kron(laplacian, _eye(count)) + torch.kron(_eye(size), chain)
            size *= count
        inverse = _eye(size) - length**2 * laplacian
        root = torch.linalg.inv(inverse)
        scale = deviation / root.square().sum(1).mean().sqrt()
        self.register_buffer("mean", torch.full((size,), mean, dtype=torch.float64))
        self.register_buffer("root", scale * root)
        self.register_buffer("inverse_root", inverse / scale)

    def colour(self, v: Tensor) -> Tensor:
        """U of whitened v, both (batch, cells)."""
        return self.mean + v @ self.root

    def whiten(self, u: Tensor) -> Tensor:
        """V of u, both (batch, cells)."""
        return (u - self.mean) @ self.inverse_root


class InverseNetwork(nn.Module):
    """Psi: an observation (batch, observed) to a whitened parameter (batch, cells).

    Inputs are centred, and multiplied by a matrix that is fixed by the training data (see
    `whitening` and `scaling`).

    Args:
        observations: of the training, (samples, observed).
        weight: applied to centred observations, (observed, inputs).
        cells: size of the output.
        hidden: units of the hidden layer; 0 is an affine network.
    """

    centre: Tensor
    weight: Tensor

    def __init__(self, observations: Tensor, weight: Tensor, cells: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("centre", observations.mean(0))
        self.register_buffer("weight", weight)
        inputs, dtype = weight.shape[1], weight.dtype
        self.layers = nn.Sequential()
        if hidden:
            self.layers.append(nn.Linear(inputs, hidden, dtype=dtype))
            self.layers.append(nn.GELU())
        self.layers.append(nn.Linear(hidden or inputs, cells, dtype=dtype))

    def forward(self, y: Tensor) -> Tensor:
        v: Tensor = self.layers((y - self.centre) @ self.weight)
        return v


def scaling(observations: Tensor) -> Tensor:
    """A multiple of the identity that gives observations (samples, observed) variance 1."""
    eye = torch.eye(observations.shape[1], dtype=observations.dtype, device=observations.device)
    return eye / observations.std()


def whitening(observations: Tensor, ridge: float = 0.0) -> Tensor:
    """What gives observations (samples, observed) an identity covariance, after adding ``ridge``.

    Directions without any variance are dropped. Then the best affine network is unique, and its
    loss is so well conditioned that conjugate gradients find it to rounding.
    """
    centred = observations - observations.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(observations))
    variances = variances + ridge
    kept = variances > 1e-12 * variances[-1]
    weight: Tensor = directions[:, kept] / variances[kept].sqrt()
    return weight


class Objective(nn.Module):
    """A loss of an inverse network; one graph from the observation through G to a scalar.

    Args:
        network: Psi.
        problem: G, from (batch, cells) to (batch, observed).
        prior: of the parameter.
        noise: standard deviation sigma of the observations.
        alpha: weight of the second term.
    """

    def __init__(
        self,
        network: nn.Module,
        problem: nn.Module,
        prior: GaussianPrior,
        noise: float,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.problem, self.prior = network, problem, prior
        self.noise, self.alpha = noise, alpha

    def misfit(self, v: Tensor, y: Tensor) -> Tensor:
        """1/2 ||y - G(u)||^2 / sigma^2, per sample (batch,)."""
        return _half_square((y - self.problem(self.prior.colour(v))) / self.noise)

    def losses(self, y: Tensor, u: Tensor) -> Tensor:
        """Per pair (batch,) of y (batch, observed) and u (batch, cells)."""
        raise NotImplementedError

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        return self.losses(y, u).mean()

    def invert(self, y: Tensor) -> Tensor:
        """The parameter u (batch, cells) that the network finds for y."""
        v: Tensor = self.network(y)
        return self.prior.colour(v)


class NDNN(Objective):
    """Regression on true parameters; knows neither G nor the noise."""

    def losses(self, y: Tensor, u: Tensor) -> Tensor:
        return _half_square(self.network(y) - self.prior.whiten(u))


class McDNN(Objective):
    """Regression that also has to explain the observation."""

    def losses(self, y: Tensor, u: Tensor) -> Tensor:
        v: Tensor = self.network(y)
        return _half_square(v - self.prior.whiten(u)) + self.alpha * self.misfit(v, y)


class TNet(Objective):
    """The Tikhonov functional; true parameters do not enter."""

    def losses(self, y: Tensor, _u: Tensor) -> Tensor:
        v: Tensor = self.network(y)
        return self.misfit(v, y) + self.alpha * _half_square(v)


def _half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(1)


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _chain_laplacian(count: int) -> Tensor:
    """Second differences on a unit interval of ``count`` cells with zero flux at its ends."""
    differences = torch.diff(_eye(count), dim=0) * count
    return -differences.T @ differences
