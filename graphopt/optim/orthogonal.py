"""Muon's orthogonalisation: Newton-Schulz iterations in bfloat16, for one matrix or many.

From X = G / |G|, each step is X <- a X + (b A + c A^2) X with A = X X^T (Jordan et al.,
kellerjordan.github.io/posts/muon). Singular values come close to 1, between about 0.7 and 1.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)
# Elements that are orthogonalised in one batch; more would only need more memory.
BATCH = 2**26


def orthogonalised(
    matrix: Tensor, coefficients: Coefficients = COEFFICIENTS, steps: int = 5, eps: float = 1e-7
) -> Tensor:
    """One matrix, or matrices of one shape by one batched product each, in bfloat16.

    A matrix alone has the bits of `torch.optim.Muon`; those of a batch may differ by the rounding
    of the batched kernels.

    Args:
        matrix: [rows, columns] or [count, rows, columns], floating point.
        coefficients: a, b, c.
        steps: how many.
        eps: what the norm is at least.
    """
    if matrix.dim() == 3 and len(matrix) == 1:
        return orthogonalised(matrix[0], coefficients, steps, eps)[None]
    a, b, c = coefficients
    x = matrix.bfloat16()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram_update = add(gram, gram, gram, beta=b, alpha=c)
        x = add(x, gram_update, x, beta=a)
    return x if wide else x.mT


def orthogonalised_by_shape(
    matrices: Sequence[Tensor], coefficients: Coefficients, steps: int, eps: float
) -> list[Tensor]:
    """Many matrices, each [groups, rows, columns]; those of one shape are stacked."""
    results: list[Tensor | None] = [None] * len(matrices)
    for indices in _batches(matrices):
        stacked = torch.cat([matrices[i] for i in indices])
        found = orthogonalised(stacked, coefficients, steps, eps)
        parts = torch.split(found, [len(matrices[i]) for i in indices])
        for i, part in zip(indices, parts, strict=True):
            results[i] = part
    return [result for result in results if result is not None]


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape[1:], matrix.device), []).append(index)
    for indices in by_shape.values():
        size = max(1, BATCH // max(1, matrices[indices[0]].numel()))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def rate_factor(adjust: str | None, rows: int, columns: int) -> float:
    """What the learning rate is multiplied with, for a matrix from `columns` inputs to `rows`.

    Args:
        adjust: ``"match_rms_adamw"``: ``0.2 sqrt(max(rows, columns))``, so that updates are as
            large as those of AdamW (Liu et al., arXiv 2502.16982); ``"original"`` or ``None``:
            ``sqrt(max(1, rows / columns))``.
        rows: outputs.
        columns: inputs.
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
