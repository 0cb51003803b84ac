"""Sums of low-rank terms as one block, truncated once.

The contract is that of `compress.recompress`, whose checks are shared by the blocks of a batch and
would take nearly all the time of a small block alone. Here residuals are measured column by column,
and the bases of Householder QR count as orthonormal to six digits, which they are (Higham, Accuracy
and Stability of Numerical Algorithms, theorem 19.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.hierarchical.arithmetic.magnitudes import column_norms, pair_magnitude
from graphopt.hierarchical.blocks import Dense, LowRank
from graphopt.hierarchical.compress import recompress, svd
from graphopt.hierarchical.rounding import gamma, norm, storage

Pair = tuple[Tensor, Tensor]  # left [m, k] and right [n, k] of left @ right.T
_DOUBLE = torch.float64
_SLACK = 1 + 1e-6
# Rows times columns of a factor up to which theorem 19.4 promises the six digits.
_LARGEST = 10**7
_SAMPLES = 20


def joined(pairs: list[Pair]) -> Pair:
    """One term for the sum of several."""
    return torch.cat([u for u, _ in pairs], 1), torch.cat([v for _, v in pairs], 1)


def truncated(pairs: list[Pair], tolerance: float) -> tuple[Dense | LowRank, float]:
    """The sum of low-rank terms as one block, and a bound of its error.

    Args:
        pairs: at least one, of one shape.
        tolerance: of truncation, absolute (Frobenius).

    Returns:
        The block, dense where that needs less memory. The error exceeds `tolerance` by rounding.
    """
    left, right = joined([pair for pair in pairs if pair[0].shape[1]] or pairs[:1])
    m, n = left.shape[0], right.shape[0]
    left, right, error = truncated_pair(left, right, tolerance)
    if left.shape[1] * (m + n) > m * n:
        lost = gamma(left.shape[1], left.dtype) * pair_magnitude(left, right)
        return Dense(left @ right.T), error + lost
    return LowRank(left, right), error


def truncated_pair(left: Tensor, right: Tensor, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """Factors of the smallest rank whose product is within `tolerance` of ``left @ right.T``.

    Args:
        left: [m, k].
        right: [n, k].
        tolerance: of the Frobenius norm, absolute.

    Returns:
        ``(left [m, r], right [n, r], error)``; singular values are in `left`.
    """
    (m, k), n, dtype = left.shape, right.shape[0], left.dtype
    if not k:
        return left, right, 0.0
    if max(m, n) * k > _LARGEST:
        return recompress(left, right, tolerance)
    a, b = left.double(), right.double()
    lengths, widths = column_norms(a), column_norms(b)
    size = float(lengths @ widths)
    if k >= min(m, n):
        core, bases, lost = a @ b.T, None, gamma(k, _DOUBLE) * size
    else:
        (q, r), (p, s) = torch.linalg.qr(a), torch.linalg.qr(b)
        core, bases = r @ s.T, (q, p)
        far = column_norms(a - q @ r) @ widths + lengths @ column_norms(b - p @ s)
        # Five products with at most k terms, among them those of the line above.
        lost = float(far) * _SLACK + 6 * gamma(k + 2, _DOUBLE) * (1 + k**0.5) * size
    u, values, v, rest = _decomposed(core, tolerance)
    tolerance = math.sqrt(tolerance**2 - rest**2)
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = int((tail > tolerance).sum())
    u, v = u[:, :rank] * values[:rank], v[:, :rank]
    error = norm(core - u @ v.T) + 3 * gamma(rank + 2, _DOUBLE) * size
    found, other = (u, v) if bases is None else (bases[0] @ u, bases[1] @ v)
    if dtype != _DOUBLE:
        error += 3 * storage(dtype) * float(values[:rank].sum())
    return found.to(dtype), other.to(dtype).contiguous(), (error + lost) * _SLACK


def _decomposed(core: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """``(u, values, v)`` of a core, and the norm of what they leave out, at most half of that.

    A large core of small rank meets random vectors first (Halko, Martinsson, Tropp, "Finding
    structure with randomness", 2011); whether their range is enough is measured.
    """
    samples = _SAMPLES
    while tolerance > 0 and 3 * samples <= min(core.shape):
        generator = torch.Generator().manual_seed(samples)
        normal = torch.randn(core.shape[1], samples, dtype=_DOUBLE, generator=generator)
        q = torch.linalg.qr(core @ normal.to(core.device))[0]
        inner = q.T @ core
        rest = norm(core - q @ inner)
        if rest <= tolerance / 2:
            u, values, v = svd(inner)
            return q @ u, values, v, rest
        samples *= 2
    return *svd(core), 0.0
