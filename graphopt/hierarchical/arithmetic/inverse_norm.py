"""Upper bounds of norms of an inverse, by random vectors, from its factors.

All bounds hold with a probability of at least 1 - 1e-10 over the random vectors, together. These
come from a generator with a fixed seed, so that results repeat. Everything is computed in float64,
whatever the dtype of the factors.

Spectral norm: for a random unit vector x, the component along the first singular vector is below
tau with a probability of at most ``0.8 sqrt(n) tau``, so that ``nu^s <= c |M^-1 M^-T ... x|`` with
s factors fails with at most ``0.8 sqrt(n) / c`` (J. D. Dixon, "Estimating extremal eigenvalues and
condition numbers of matrices", SIAM J. Numer. Anal. 20, 1983, theorem 1), and fails for all of q
independent vectors with at most the q-th power of that.

Frobenius norm: see `probability.norm_factor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.arithmetic.factor import Factors
from graphopt.hierarchical.arithmetic.triangular import corner
from graphopt.hierarchical.probability import norm_factor
from graphopt.hierarchical.rounding import gamma, norm

PROBES = 32
STEPS = 6
RISK = 1e-10  # that one of the bounds fails
FAILURE = RISK / 4  # for each of the norms and traces that one result needs
_DOUBLE = torch.float64


@dataclass(frozen=True)
class InverseNorms:
    """Of ``M^-1`` for ``M = lower @ upper.T`` as it is stored.

    Attributes:
        spectral: a bound, inf where rounding leaves none.
        frobenius: a bound, inf where rounding leaves none.
        lost: for a system ``M y = b`` solved in float64, ``|M y - b|`` is at most ``lost |y|``.
    """

    spectral: float
    frobenius: float
    lost: float


def probes(n: int, like: Tensor, seed: int = 0) -> Tensor:
    """[n, PROBES] normal numbers in float64 on the device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, PROBES, dtype=_DOUBLE, generator=generator).to(like.device)


def solved(factors: Factors, b: Tensor, transpose: bool = False) -> Tensor:
    """``M^-1 b`` or ``M^-T b``, in the dtype of `b`; b: [n, c]."""
    first, second = factors.lower, factors.upper
    if transpose:
        first, second = second, first
    return second.solve(first.solve(b), transpose=True)


def solving_error(factors: Factors, dtype: torch.dtype) -> float:
    """A bound of ``|M y - b| / |y|`` for a system solved in `dtype`.

    Both triangles leave residuals, the second one seen through the first triangle:
    ``|M y - b| <= |L| |f_2| + |f_1|`` with the bounds of `triangular.Corner.solve`.
    """
    lost = max(gamma(f.length, dtype) for f in (factors.lower, factors.upper))
    found = 4 * lost * factors.lower.magnitude * factors.upper.magnitude / (1 - 4 * lost)
    return found if lost < 0.01 else math.inf


def inverse_norms(factors: Factors, known: float = math.inf) -> InverseNorms:
    """Bounds of the norms of the inverse of what the factors are of.

    Args:
        factors: of M.
        known: another bound of the spectral norm.
    """
    n, lost = factors.lower.size, solving_error(factors, _DOUBLE)
    normal = probes(n, corner(factors.lower).values)
    found = solved(factors, normal)
    frobenius = norm_factor(PROBES, FAILURE) * norm(found) / math.sqrt(PROBES)
    failure = FAILURE ** (1 / PROBES)
    constant = 0.8 * math.sqrt(n) / failure
    lengths = torch.linalg.vector_norm(normal, dim=0)
    sizes = [_largest(found, lengths)]
    for step in range(1, STEPS):
        found = solved(factors, found, transpose=step % 2 == 1)
        sizes.append(_largest(found, lengths))
    spectral = min(_largest_root(constant, sizes, lost), known)
    if not math.isfinite(spectral):
        return InverseNorms(math.inf, math.inf, lost)
    frobenius *= 1 + spectral * lost
    # Rounding of the sums of squares above.
    slack = 1 + gamma(4 * n, _DOUBLE)
    return InverseNorms(min(spectral, frobenius) * slack, frobenius * slack, lost)


# -- helpers ---------------------------------------------------------------------------------------


def _largest(values: Tensor, lengths: Tensor) -> float:
    found = float((torch.linalg.vector_norm(values, dim=0) / lengths).max())
    return found if math.isfinite(found) else math.inf


def _largest_root(constant: float, sizes: list[float], lost: float) -> float:
    """The largest nu with ``nu^s <= c (|y_s| + lost sum_i nu^(s-i+1) |y_i|)``.

    A step with an inexact solve is off by ``lost nu |y_i|``, and later steps multiply that by at
    most nu each. The right side grows slower than the left one from one point on, and all its
    coefficients are positive, so there is one root only (Descartes), which iterating from below
    finds.
    """
    steps = len(sizes)
    if not all(map(math.isfinite, sizes)) or constant * lost * sizes[0] >= 0.5:
        return math.inf
    found: float = (constant * sizes[-1]) ** (1 / steps)
    for _ in range(1000):
        rest = sum(found ** (steps - i) * size for i, size in enumerate(sizes))
        new: float = (constant * (sizes[-1] + lost * rest)) ** (1 / steps)
        if new <= found * (1 + 1e-12):
            return new * (1 + 1e-6)
        found = new
    return math.inf
