"""The Gaussian filter of a latent state that is a set of independent planes, in closed form.

The latent state h consists of K planes (2-vectors) that evolve independently, so that every matrix
is 2 x 2 and every inverse is scalar algebra. Tensors carry the components of planes first: vectors
have the shape (2, ..., K), matrices (2, 2, ..., K).

An observation enters by its precision J and its information η, precision times observed value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Belief(NamedTuple):
    """Gaussians N(mean, covariance), one per plane."""

    mean: Tensor
    covariance: Tensor


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Products of 2 x 2 matrices; elementwise, since operators for matrices start one call each."""
    return (left.unsqueeze(2) * right.unsqueeze(0)).sum(1)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of 2 x 2 matrices with 2-vectors."""
    return (matrix * vector.unsqueeze(0)).sum(1)


def transposed(matrix: Tensor) -> Tensor:
    """Transposes of 2 x 2 matrices."""
    return matrix.transpose(0, 1)


def determinant(matrix: Tensor) -> Tensor:
    """Determinants of symmetric 2 x 2 matrices."""
    return matrix[0, 0] * matrix[1, 1] - matrix[0, 1].square()


def adjugate(matrix: Tensor) -> Tensor:
    """det(M) M⁻¹ of symmetric 2 x 2 matrices, which is linear: tr(M) I - M."""
    eye = torch.eye(2, dtype=matrix.dtype, device=matrix.device)
    trace = matrix[0, 0] + matrix[1, 1]
    return eye.reshape(2, 2, *[1] * trace.dim()) * trace - matrix


def diagonal(entries: Tensor) -> Tensor:
    """Diagonal matrices with these 2-vectors of entries."""
    zero = torch.zeros_like(entries[0])
    return torch.stack([torch.stack([entries[0], zero]), torch.stack([zero, entries[1]])])


def update(prior: Belief, precision: Tensor, information: Tensor) -> Belief:
    """Condition on an observation: Σ⁻¹ ← Σ⁻¹ + J, Σ⁻¹μ ← Σ⁻¹μ + η.

    Neither Σ nor J is inverted: (Σ⁻¹ + J)⁻¹ = (Σ + |Σ| adj J) / (1 + tr ΣJ + |Σ||J|), where the
    denominator is never below 1.
    """
    size = determinant(prior.covariance)
    overlap = (prior.covariance * precision).sum((0, 1))
    scale = 1 + overlap + size * determinant(precision)
    covariance = (prior.covariance + size * adjugate(precision)) / scale
    surprise = information - matvec(precision, prior.mean)
    return Belief(prior.mean + matvec(covariance, surprise), covariance)


def predict(belief: Belief, transition: Tensor, noise: Tensor) -> Belief:
    """Move on: μ ← Aμ, Σ ← AΣAᵀ + C."""
    moved = matmul(matmul(transition, belief.covariance), transposed(transition))
    return Belief(matvec(transition, belief.mean), moved + noise)


def beliefs_in_sequence(
    initial: Belief, transition: Tensor, noise: Tensor, precision: Tensor, information: Tensor
) -> tuple[Belief, Belief]:
    """The beliefs before each observation, and the one after the last transition, step by step.

    Args:
        initial: before the first observation; vectors of shape (2, B, K).
        transition: A, (2, 2, 1, K).
        noise: covariance of the transition's noise, (2, 2, 1, K).
        precision: J of the observations, (2, 2, B, T, K).
        information: η of the observations, (2, B, T, K).

    Returns:
        T beliefs, with time in the dimension before the last, and one.
    """
    before, belief = [], initial
    for j, eta in zip(precision.unbind(-2), information.unbind(-2), strict=True):
        before.append(belief)
        belief = predict(update(belief, j, eta), transition, noise)
    return Belief(*(torch.stack(parts, -2) for parts in zip(*before, strict=True))), belief


def divergence(after: Belief, before: Belief) -> Tensor:
    """KL(after ‖ before) of each plane, in nats."""
    size = determinant(before.covariance)
    inverse = adjugate(before.covariance) / size
    moved = after.mean - before.mean
    overlap = (inverse * after.covariance).sum((0, 1))
    distance = (moved * matvec(inverse, moved)).sum(0)
    ratio = size.log() - determinant(after.covariance).log()
    return 0.5 * (overlap + distance - 2 + ratio)


def samples(belief: Belief, noise: Tensor) -> Tensor:
    """Draws from a belief: μ + L ε with the Cholesky factor L of Σ.

    Args:
        belief: vectors of shape (2, ..., K).
        noise: standard normal, of the same shape.
    """
    (xx, xy), (_, yy) = belief.covariance
    first = xx.sqrt()
    across = xy / first
    second = (yy - across.square()).sqrt()
    return belief.mean + torch.stack([first * noise[0], across * noise[0] + second * noise[1]])
