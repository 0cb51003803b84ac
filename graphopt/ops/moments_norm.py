"""Unit-wise moments of a norm: what its scale and shift need for each channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.ops.moments_rows import working_dtype


def norm_moment(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    statistics_shape: Sequence[int],
    parameter_shape: Sequence[int],
    shift: bool,
    scale: float,
) -> Tensor:
    """The 2x2 Fisher block of each channel, from its gradients example by example.

    With ``x̂ = (x - mean) * rstd``, the gradients of example n are ``p_n = Σ grad * x̂`` for the
    scale and ``q_n = Σ grad`` for the shift, summed over its positions. The blocks
    ``[[Σ p², Σ pq], [Σ pq, Σ q²]]`` over all n are those of SP-NGD (Osawa et al., "Scalable and
    Practical Natural Gradient for Large-Scale Deep Learning", unit-wise natural gradient).

    Args:
        grad: gradient of the norm's output, of the shape of `x`.
        x: input of the norm; dimension 0 tells examples apart.
        mean: saved mean, or None for a norm that does not subtract it.
        rstd: saved reciprocal of the standard deviation.
        statistics_shape: shape of `mean` and `rstd` that broadcasts to `x`.
        parameter_shape: shape of the scale that broadcasts to `x`, with 1 where it is constant.
        shift: whether the norm has a shift.
        scale: factor of all sums.

    Returns:
        [P, 3] with ``Σ p²``, ``Σ pq``, ``Σ q²`` for each of P channels, in the order of a packed
        2x2 matrix; without a shift [P, 1]. float64 for float64, else float32.
    """
    dtype = working_dtype(x)
    grad, normalized = grad.to(dtype), x.to(dtype)
    if mean is not None:
        normalized = normalized - mean.to(dtype).view(statistics_shape)
    normalized = normalized * rstd.to(dtype).view(statistics_shape)
    shape = [1] * (x.dim() - len(parameter_shape)) + list(parameter_shape)
    if not shape or shape[0] != 1:
        # The parameter covers dimension 0 as well: there is a single example.
        shape, grad, normalized = [1, *shape], grad.unsqueeze(0), normalized.unsqueeze(0)
    summed = [dim for dim in range(1, len(shape)) if shape[dim] == 1]
    entries = math.prod(shape)
    gamma = _examples(grad * normalized, summed, entries)
    columns = [gamma.square().sum(0)]
    if shift:
        beta = _examples(grad, summed, entries)
        columns += [(gamma * beta).sum(0), beta.square().sum(0)]
    return torch.stack(columns, 1).mul_(scale)


def _examples(values: Tensor, summed: list[int], entries: int) -> Tensor:
    """[examples, P]: `values` summed over the given dimensions."""
    if summed:
        values = values.sum(summed)
    return values.reshape(values.shape[0], entries)
