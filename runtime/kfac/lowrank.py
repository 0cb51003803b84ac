"""Low rank plus a multiple of the identity, for large sides.

A side of size d > 4 r keeps its r largest eigenpairs, found by subspace iteration from a random
start (Halko, Martinsson and Tropp, SIAM Review 2011, arXiv 0909.4061, algorithms 4.4 and 5.3). The
other eigenvalues are replaced by their mean δ = (tr - Σ kept) / (d - r). With s = δ + damping, the
identity of Woodbury gives the inverse

    (U diag(w - δ) Uᵀ + s I)⁻¹ = I / s + U diag(1 / (w + damping) - 1 / s) Uᵀ,

which is positive definite, as all w and δ are at least 0. It is kept as U and two vectors. Damping
is split as in `factored`, and smaller and diagonal sides are treated as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac.eigen import decompose
from graphopt.runtime.kfac.factored import (
    Inversion,
    invert,
    multiply,
    on_side,
    solve_damped,
)
from graphopt.runtime.kfac.solve import Problem, Solution, in_batches, on_columns, on_rows

# Directions beyond the rank, and multiplications of the subspace: both sharpen the pairs kept.
_SPARE = 8
_ITERATIONS = 2
_SEED = 20110


@dataclass(frozen=True)
class LowRank:
    """The solver.

    Of a side that is reduced, solutions hold ``left_basis`` ``[B, d, r]``, ``left_weights``
    ``[B, r]`` and ``left_scale`` ``[B]``; of another one ``left_inverse`` as `Factored`.

    Attributes:
        rank: r; sides of size up to 4 r are inverted exactly.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ArgumentError(f"rank={self.rank} keeps nothing", hint="start with rank=64")

    def solve(self, problems: Sequence[Problem], damping: float) -> list[Solution | None]:
        """See `Solver.solve`."""
        # Pairs do not depend on the damping: an escalated block keeps them.
        kept: dict[tuple[int, str], tuple[Tensor, ...]] = {}

        def inverter(tasks: Sequence[Inversion]) -> list[Solution]:
            square = [task for task in tasks if task.matrix.dim() == 3 and not task.low_rank]
            large = [task for task in square if task.matrix.shape[1] > 4 * self.rank]
            new = [task for task in large if (task.problem, task.side) not in kept]
            pairs = in_batches([(task.matrix,) for task in new], self._pairs)
            kept.update({(t.problem, t.side): p for t, p in zip(new, pairs, strict=True)})
            exact = iter(invert([task for task in tasks if (task.problem, task.side) not in kept]))
            solutions = []
            for task in tasks:
                pair = kept.get((task.problem, task.side))
                solutions.append(next(exact) if pair is None else woodbury(pair, task.damping))
            return solutions

        return solve_damped(problems, damping, inverter)

    def apply(self, solution: Solution, gradient: Tensor) -> Tensor:
        """See `Solver.apply`."""
        first = next(value for key, value in solution.items() if key != "damping")
        wide = gradient.to(torch.promote_types(gradient.dtype, first.dtype))
        for side, cut in (("left", on_rows), ("right", on_columns)):
            basis = solution.get(f"{side}_basis")
            blocks, operation = (
                on_side(solution, side)
                if basis is None
                else (len(basis), partial(_apply, solution, side))
            )
            wide = cut(wide, blocks, operation)
        return wide.to(gradient.dtype).contiguous()

    def _pairs(self, matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return leading_pairs(matrices, self.rank)


def leading_pairs(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest eigenvalues of positive semi-definite matrices, and the mean of the others.

    The random start is always the same one, so that a result can be had again.

    Args:
        matrices: shape ``[N, d, d]``.
        rank: r, at most d.

    Returns:
        w ``[N, r]``, U ``[N, d, r]`` with orthonormal columns, and δ ``[N]``; none negative.
    """
    size = matrices.shape[1]
    width = min(size, rank + _SPARE)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(size, width, generator=generator, dtype=torch.float64)
    span = start.to(matrices).expand(len(matrices), size, width)
    for _ in range(1 + _ITERATIONS):
        span = torch.linalg.qr(matrices @ span).Q
    values, turn = decompose(span.mT @ (matrices @ span))
    values, turn = values[:, width - rank :], turn[:, :, width - rank :]
    rest = matrices.diagonal(dim1=1, dim2=2).sum(1) - values.sum(1)
    return values, span @ turn, (rest / max(1, size - rank)).clamp(min=0)


def woodbury(pairs: Sequence[Tensor], damping: Tensor) -> Solution:
    """The damped inverse.

    Args:
        pairs: what `leading_pairs` returns.
        damping: what is added to the diagonals, ``[N]`` or the same for all.

    Returns:
        ``basis`` U ``[N, d, r]``, ``weights`` ``[N, r]`` and ``scale`` ``[N]``, such that the
        inverse is ``scale I + U diag(weights) Uᵀ``.
    """
    values, basis, rest = pairs
    damping = damping.expand(len(values))
    scale = (rest + damping).reciprocal()
    weights = (values + damping[:, None]).reciprocal() - scale[:, None]
    return {"basis": basis, "weights": weights, "scale": scale}


def _apply(solution: Solution, side: str, pieces: Tensor) -> Tensor:
    basis, weights, scale = (
        solution[f"{side}_{name}"].to(pieces.dtype) for name in ("basis", "weights", "scale")
    )
    everywhere = multiply(scale[:, None].expand(basis.shape[:2]), pieces)
    return everywhere + basis @ multiply(weights, basis.mT @ pieces)
