"""Exact damping in the eigenbasis of both sides.

With G = Q_G diag(d_G) Q_Gᵀ and A = Q_A diag(d_A) Q_Aᵀ, the inverse of A ⊗ G + λ I maps M to

    Q_G ((Q_Gᵀ M Q_A) / (d_G d_Aᵀ + λ)) Q_Aᵀ

(Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML
2016, arXiv 1602.01407). A diagonal side is its own eigenbasis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac.factored import multiply
from graphopt.runtime.kfac.solve import (
    Problem,
    Solution,
    all_finite,
    check_damping,
    in_batches,
    on_columns,
    on_rows,
    usable,
)

# How many additions to its diagonal, each ten times the last, a matrix is tried with.
_JITTERS = 4
_NotConvergedError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Eigen:
    """The solver.

    Its solutions hold ``left_values`` ``[B, d]`` and, of a dense side, ``left_basis`` ``[B, d, d]``
    with eigenvectors in columns; likewise for the right.
    """

    def solve(self, problems: Sequence[Problem], damping: float) -> list[Solution | None]:
        """See `Solver.solve`. λ is never escalated, as the divisor is at least λ."""
        check_damping(damping)
        solutions: list[Solution | None] = [None] * len(problems)
        good = usable(problems)
        if not good:
            return solutions
        found: dict[int, Solution] = {index: {} for index in good}
        dense: list[tuple[int, str, Tensor]] = []
        for index in good:
            problem = problems[index]
            found[index]["damping"] = torch.tensor(
                damping, dtype=torch.float64, device=problem.left.device
            )
            for side, matrix in (("left", problem.left), ("right", problem.right)):
                if side in problem.low_rank:
                    raise ArgumentError(
                        f"the {side} side is of low rank, and has no eigenvectors here",
                        where=problem.name,
                        hint="use solver=factored or lowrank, or cut it into blocks by rank=0",
                    )
                if matrix.dim() == 3:
                    dense.append((index, side, matrix.to(problem.dtype)))
                else:
                    found[index][f"{side}_values"] = matrix.to(problem.dtype).clamp(min=0)
        results = in_batches([(matrix,) for *_, matrix in dense], decompose)
        for (index, side, _), (values, basis) in zip(dense, results, strict=True):
            found[index][f"{side}_values"] = values
            found[index][f"{side}_basis"] = basis
        finite = all_finite([tuple(found[index].values()) for index in good])
        for index, is_finite in zip(good, finite, strict=True):
            solutions[index] = found[index] if is_finite else None
        return solutions

    def apply(self, solution: Solution, gradient: Tensor) -> Tensor:
        """See `Solver.apply`."""
        groups, rows, columns = gradient.shape
        left, right = solution["left_values"], solution["right_values"]
        dtype = torch.promote_types(gradient.dtype, left.dtype)
        wide = rotate(solution, gradient.to(dtype), inverse=False)
        left, right = left.reshape(groups, rows, 1), right.reshape(groups, 1, columns)
        wide = wide / (left * right + solution["damping"])
        return rotate(solution, wide, inverse=True).to(gradient.dtype).contiguous()


def rotate(solution: Solution, gradient: Tensor, *, inverse: bool) -> Tensor:
    """``Q_Gᵀ M Q_A`` of a gradient ``[groups, rows, columns]``; inverse: ``Q_G M Q_Aᵀ``.

    Raises:
        ArgumentError: the gradient does not fit the bases.
    """
    for side, cut in (("left", on_rows), ("right", on_columns)):
        values, basis = solution[f"{side}_values"], solution.get(f"{side}_basis")
        # A diagonal side is multiplied by ones, for the check of its shape only.
        turn = torch.ones_like(values) if basis is None else basis if inverse else basis.mT
        gradient = cut(gradient, len(values), partial(multiply, turn))
    return gradient


def decompose(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[N, d]``, ascending and at least 0, and eigenvectors of ``[N, d, d]``.

    Moments have no negative eigenvalues; rounding gives them some. A matrix for which the iteration
    does not converge is tried again with a little added to its diagonal; at last it yields NaN.
    """
    try:
        values, basis = torch.linalg.eigh(matrices)
    except _NotConvergedError:
        parts = [_persist(matrix[None]) for matrix in matrices]
        values, basis = (torch.cat(column) for column in zip(*parts, strict=True))
    return values.clamp(min=0), basis


def _persist(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposes one matrix ``[1, d, d]``, which may have failed because of others in its batch."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    unit = torch.finfo(matrix.dtype).eps * diagonal.abs().max()
    for jitter in (0.0, *(10.0**attempt for attempt in range(_JITTERS))):
        try:
            values, basis = torch.linalg.eigh(
                matrix + torch.diag_embed((jitter * unit).expand_as(diagonal))
            )
        except _NotConvergedError:
            continue
        return values, basis
    return torch.full_like(diagonal, math.nan), torch.full_like(matrix, math.nan)
