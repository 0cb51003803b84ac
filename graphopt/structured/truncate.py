"""The least rank within a tolerance, and the factors of a rank; in float64 and reproducible.

Small blocks by the singular value decomposition. Large ones by a randomised range finder with two
power iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4), whose residual is computed and
not estimated, so that what is said about an error holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From this size on the range finder is cheaper than a decomposition.
LARGE = 512
_OVERSAMPLED = 16
# Of the largest direction, what a missing one has on the right.
_LEAST = 2.0**-7


def least_rank(block: Tensor, allowed: float, limit: int) -> int | None:
    """A rank of at most `limit` at which the error in the Frobenius norm is at most `allowed`.

    The least one for blocks below `LARGE`. ``None``: there is none.
    """
    if min(block.shape) < LARGE:
        rank = _rank_of(torch.linalg.svdvals(block), 0.0, allowed)
        return rank if rank <= limit else None
    if out_of_reach(block, allowed, limit):
        return None
    size = 32
    while True:
        size = min(size, limit + _OVERSAMPLED, min(block.shape))
        basis = _range(block, size)
        inside = basis.mT @ block
        outside = float(torch.linalg.norm(block - basis @ inside))
        if outside <= allowed:
            rank = _rank_of(torch.linalg.svdvals(inside), outside, allowed)
            if rank <= limit:
                return rank
        if size >= min(limit + _OVERSAMPLED, *block.shape):
            return None
        size *= 2


def out_of_reach(block: Tensor, allowed: float, rank: int) -> bool:
    """Whether no matrix of this rank is within `allowed`, for the price of one product.

    With singular values s, Cauchy and Schwarz give sum_{i<=r} s_i^2 <= sqrt(r sum s_i^4), and the
    last sum is the squared norm of B Bᵀ. So the best error squared is at least
    |B|^2 - sqrt(r) |B Bᵀ|. A margin of 1 % covers the rounding of the product.
    """
    narrow = block if block.shape[0] <= block.shape[1] else block.mT
    short = narrow.float()
    total = float(torch.linalg.norm(short)) ** 2
    gram = float(torch.linalg.norm(short @ short.mT))
    least = total - float(rank) ** 0.5 * gram
    return bool(least > allowed**2 + 0.01 * total)


def split(block: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [m, rank] and [rank, n] of equal norms, nearest to a block [m, n].

    A direction that the block has none of has a zero on the left only: with zeros on both sides the
    gradients of both would be zero, and training could never come to it.
    """
    if min(block.shape) < LARGE or 2 * (rank + _OVERSAMPLED) > min(block.shape):
        u, s, v = torch.linalg.svd(block, full_matrices=False)
    else:
        basis = _range(block, rank + _OVERSAMPLED)
        inside, s, v = torch.linalg.svd(basis.mT @ block, full_matrices=False)
        u = basis @ inside
    kept = s[:rank]
    largest = float(kept[0].sqrt()) or 1.0
    on_right = kept.sqrt().clamp(min=largest * _LEAST)
    left, right = u[:, :rank] * (kept / on_right), on_right[:, None] * v[:rank]
    missing = rank - left.shape[1]
    if missing <= 0:
        return left, right
    # A rank above the sizes of the block: levels share one rank.
    pad = torch.nn.functional.pad
    return pad(left, (0, missing)), pad(right, (0, 0, 0, missing))


def _rank_of(s: Tensor, outside: float, allowed: float) -> int:
    """How many singular values to keep, where `outside` of them is an error already."""
    tails = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]) + outside**2
    return int((tails > allowed**2).sum())


def _range(block: Tensor, size: int) -> Tensor:
    """An orthonormal basis [m, size] of most of what a block [m, n] reaches."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(block.shape[1], size, generator=generator, dtype=block.dtype)
    basis: Tensor = torch.linalg.qr(block @ start.to(block.device))[0]
    for _ in range(2):
        basis = torch.linalg.qr(block.mT @ basis)[0]
        basis = torch.linalg.qr(block @ basis)[0]
    return basis
