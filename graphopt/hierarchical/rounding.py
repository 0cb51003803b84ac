"""Units of rounding, and the constants of error analysis that are made of them."""

from __future__ import annotations

import torch
from torch import Tensor

_MANTISSA = {torch.float64: 53, torch.float32: 24}
# Bits that matrix products keep of float32 where torch may use less.
_SHORT = {"high": 11, "medium": 8}


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff of matrix products and sums in `dtype`."""
    short = _SHORT.get(torch.get_float32_matmul_precision())
    if dtype is torch.float32 and short is not None:
        return 2.0**-short
    return storage(dtype)


def storage(dtype: torch.dtype) -> float:
    """The unit roundoff of a number that is stored in `dtype`."""
    return 2.0 ** -_MANTISSA[dtype]


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Relative error of a sum of products with so many roundings, in any order of summation.

    n u / (1 - n u); Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1.
    """
    small = terms * unit(dtype)
    return small / (1 - small) if small < 1 else float("inf")


def norm(values: Tensor) -> float:
    """An upper bound of the Frobenius norm, whatever its own rounding."""
    found = float(torch.linalg.vector_norm(values.detach().double()))
    return found * (1 + gamma(values.numel() + 2, torch.float64))


def norms(values: Tensor) -> Tensor:
    """Upper bounds of the Frobenius norms of matrices: [..., m, n] gives [...] in float64."""
    found: Tensor = torch.linalg.vector_norm(values.detach().double(), dim=(-2, -1))
    terms = values.shape[-1] * values.shape[-2]
    return found * (1 + gamma(terms + 2, torch.float64))
