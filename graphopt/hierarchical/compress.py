"""Fewer columns for a product of two factors, with an error that was measured.

Everything is computed in float64, whatever the dtype of the factors, and the error is that of the
factors as they are stored. It is a bound and no estimate: residuals of the factorisations are
formed, and what forming them may have lost is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.hierarchical.rounding import gamma, norms

_DOUBLE = torch.float64


def recompress(left: Tensor, right: Tensor, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """Factors of the smallest rank whose product is within `tolerance` of ``left @ right.T``.

    QR of both factors, then the SVD of the small core.

    Args:
        left: [m, k].
        right: [n, k].
        tolerance: of the Frobenius norm, absolute.

    Returns:
        ``(left [m, r], right [n, r], error)``; `left` has orthogonal columns and carries the
        singular values, `right` has orthonormal columns. `error` bounds the Frobenius norm of the
        difference, rounding included; it exceeds `tolerance` only by rounding.
    """
    found, other, error = recompress_batch(
        left.unsqueeze(0), right.unsqueeze(0), left.new_full((1,), tolerance, dtype=_DOUBLE)
    )
    return found[0], other[0], float(error)


def recompress_batch(
    left: Tensor, right: Tensor, tolerance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`recompress` of many products, cut at the largest rank that one of them needs.

    Args:
        left: [b, m, k].
        right: [b, n, k].
        tolerance: [b], absolute.

    Returns:
        ``(left [b, m, r], right [b, n, r], errors [b])``. Columns that a product does not need
        are zero.
    """
    dtype = left.dtype
    a, b = left.detach().double(), right.detach().double()
    if min(left.shape[-1], left.shape[-2], right.shape[-2]) == 0:
        return left[..., :0], right[..., :0], a.new_zeros(a.shape[0])
    q, r, lost_left = _orthogonal(a)
    p, s, lost_right = _orthogonal(b)
    core = r @ s.mT
    u, values, v = svd(core)
    keep = rank(values, tolerance)
    most = int(keep.max())
    needed = torch.arange(most, device=keep.device) < keep.unsqueeze(1)
    u, v = u[..., :most] * (values[:, :most] * needed).unsqueeze(1), v[..., :most]
    v = v * needed.unsqueeze(1)
    found, other = q @ u, p @ v
    stored, kept = found.to(dtype), other.to(dtype)
    # The difference is q (core - u v') p', and what QR, products and storage have lost.
    inner = norms(core - u @ v.mT) + gamma(most + 2, _DOUBLE) * (norms(core) + norms(u) * norms(v))
    inner = inner + gamma(core.shape[-1] + 1, _DOUBLE) * norms(r) * norms(s)
    size_q, size_p = _spectral(q), _spectral(p)
    outer = lost_left * norms(b) + size_q * norms(r) * lost_right
    products = gamma(u.shape[-2] + 1, _DOUBLE) * norms(q) * norms(u)
    products = norms(found - stored.double()) + products
    others = norms(other - kept.double()) + gamma(v.shape[-2] + 1, _DOUBLE) * norms(p) * norms(v)
    last = products * _spectral(other) + size_q * norms(u) * others + products * others
    return stored, kept, inner * size_q * size_p + outer + last


def svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(u, values, v)`` with ``core = u diag(values) v.T``; by another driver if one fails."""
    try:
        u, values, vt = torch.linalg.svd(core, full_matrices=False)
    except RuntimeError:
        # A tiny perturbation of the matrix, within its own rounding; the residual counts it.
        noise = torch.randn(core.shape, generator=torch.Generator().manual_seed(0)).to(core)
        scale = torch.linalg.vector_norm(core, dim=(-2, -1), keepdim=True)
        u, values, vt = torch.linalg.svd(core + noise * scale * 1e-17, full_matrices=False)
    return u, values, vt.mT


def rank(values: Tensor, tolerance: Tensor) -> Tensor:
    """How many singular values to keep so that the rest has a norm of at most `tolerance`.

    Args:
        values: [b, k], descending.
        tolerance: [b].
    """
    tail = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    return (tail > tolerance.unsqueeze(-1)).sum(-1)


def residual_bound(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Bounds of ``||values - left @ right.T||_F`` for [b, m, n], [b, m, k], [b, n, k]: [b]."""
    a, b, c = values.double(), left.double(), right.double()
    lost = gamma(b.shape[-1] + 2, _DOUBLE)
    return norms(a - b @ c.mT) + lost * (norms(a) + norms(b) * norms(c))


def _orthogonal(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """QR of [b, m, k], and bounds [b] of ``||values - q @ r||_F``."""
    q, r = torch.linalg.qr(values)
    return q, r, residual_bound(values, q, r.mT)


def _spectral(q: Tensor) -> Tensor:
    """Bounds of the spectral norms of matrices whose columns are nearly orthonormal or zero."""
    gram = q.mT @ q
    there = gram.diagonal(dim1=-2, dim2=-1) > 0.5
    far = norms(gram - torch.diag_embed(there.to(gram)))
    far = far + gamma(q.shape[-2] + 1, _DOUBLE) * norms(q).square()
    return (1 + far).sqrt()
