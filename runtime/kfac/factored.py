"""Factored damping: each side is damped by itself and inverted by Cholesky.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (ICML
2015, arXiv 1503.05671), section 6.3: instead of A ⊗ G + λ I, the inverse of

    (A + π √λ I) ⊗ (G + √λ / π I),    π = √((tr A / dim A) / (tr G / dim G))

is applied, so ``ΔM = (G + √λ / π I)⁻¹ M (A + π √λ I)⁻¹``. Scaling A by c and G by 1 / c leaves it
as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac import woodbury
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

# How often λ is multiplied by `_FACTOR` before a block is given up.
_ESCALATIONS = 6
_FACTOR = 10.0


@dataclass(frozen=True)
class Inversion:
    """One side of one problem, to be inverted.

    Attributes:
        problem: index of the problem.
        side: ``"left"`` or ``"right"``.
        matrix: ``[B, d, d]`` or, of diagonal form, ``[B, d]``; ``[B, r + 1, d]`` of low rank.
        damping: what is added to the diagonals, ``[B]``.
        low_rank: whether it is of low rank.
    """

    problem: int
    side: str
    matrix: Tensor
    damping: Tensor
    low_rank: bool = False


@dataclass(frozen=True)
class Factored:
    """The solver; its solutions hold ``left_inverse`` and ``right_inverse``.

    Of a side of low rank they hold ``left_rows`` ``[B, r, d]`` and ``left_reciprocal`` ``[B, d]``
    (`graphopt.runtime.kfac.woodbury`).
    """

    def solve(self, problems: Sequence[Problem], damping: float) -> list[Solution | None]:
        """See `Solver.solve`."""
        return solve_damped(problems, damping, invert)

    def apply(self, solution: Solution, gradient: Tensor) -> Tensor:
        """See `Solver.apply`."""
        blocks, operation = on_side(solution, "left")
        wide = gradient.to(torch.promote_types(gradient.dtype, dtype_of(solution)))
        wide = on_rows(wide, blocks, operation)
        right = solution.get("right_inverse")
        if right is not None and right.shape == (len(wide), wide.shape[2], wide.shape[2]):
            # The product that needs no transposed copy.
            wide = wide @ right.to(wide.dtype)
        else:
            wide = on_columns(wide, *on_side(solution, "right"))
        return wide.to(gradient.dtype).contiguous()


def solve_damped(
    problems: Sequence[Problem],
    damping: float,
    inverter: Callable[[Sequence[Inversion]], list[Solution]],
) -> list[Solution | None]:
    """Splits the damping between both sides, and escalates it where an inverse does not exist.

    Args:
        problems: the blocks.
        damping: λ of the first attempt.
        inverter: inverts sides; what it could not invert is not finite.

    Returns:
        See `Solver.solve`. A solution holds both results of `inverter`, under their names with
        ``left_`` and ``right_`` before them.
    """
    check_damping(damping)
    solutions: list[Solution | None] = [None] * len(problems)
    pending = usable(problems)
    ratios = {index: _ratio(problems[index]) for index in pending}
    for attempt in range(1 + _ESCALATIONS):
        if not pending:
            break
        current = damping * _FACTOR**attempt
        tasks = [
            task for i in pending for task in _tasks(i, problems[i], ratios[i], math.sqrt(current))
        ]
        found: dict[int, Solution] = {
            i: {"damping": torch.tensor(current, dtype=torch.float64, device=ratios[i].device)}
            for i in pending
        }
        for task, parts in zip(tasks, inverter(tasks), strict=True):
            found[task.problem].update({f"{task.side}_{k}": v for k, v in parts.items()})
        good = all_finite([tuple(found[index].values()) for index in pending])
        for index, is_good in zip(pending, good, strict=True):
            if is_good:
                solutions[index] = found[index]
        pending = [index for index in pending if solutions[index] is None]
    return solutions


def invert(tasks: Sequence[Inversion]) -> list[Solution]:
    """``inverse`` of each side, of its matrix's shape; with NaN where not positive definite.

    All dense matrices of one size are inverted by one batched Cholesky. Of low rank it is ``rows``
    and ``reciprocal``.
    """
    flat = [task.low_rank for task in tasks]
    dense = [task.matrix.dim() == 3 and not task.low_rank for task in tasks]
    inverses = iter(in_batches(_items(tasks, dense), _cholesky_inverse))
    pairs = iter(in_batches(_items(tasks, flat), woodbury.invert))
    found: list[Solution] = []
    for task, is_low, is_dense in zip(tasks, flat, dense, strict=True):
        if is_low:
            found.append(dict(zip(("rows", "reciprocal"), next(pairs), strict=True)))
        else:
            found.append({"inverse": next(inverses)[0] if is_dense else _reciprocal(task)})
    return found


def _items(tasks: Sequence[Inversion], wanted: Sequence[bool]) -> list[tuple[Tensor, ...]]:
    return [(t.matrix, t.damping) for t, is_wanted in zip(tasks, wanted, strict=True) if is_wanted]


def dtype_of(solution: Solution) -> torch.dtype:
    """What a solution of this module is kept in."""
    one = solution.get("left_inverse", solution.get("left_reciprocal"))
    assert one is not None
    return one.dtype


def on_side(solution: Solution, side: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Number of blocks of a side, and what multiplies pieces ``[B, d, m]`` by its inverses."""
    inverse = solution.get(f"{side}_inverse")
    if inverse is not None:
        return len(inverse), partial(multiply, inverse)
    rows, scale = solution[f"{side}_rows"], solution[f"{side}_reciprocal"]
    return len(rows), partial(woodbury.multiply, rows, scale)


def multiply(inverse: Tensor, pieces: Tensor) -> Tensor:
    """Multiplies pieces ``[B, d, m]`` by inverses ``[B, d, d]``, or ``[B, d]`` of diagonal form.

    Raises:
        ArgumentError: the sizes differ.
    """
    if inverse.shape[1] != pieces.shape[1]:
        raise ArgumentError(
            f"blocks of {pieces.shape[1]} rows do not fit inverses of size {inverse.shape[1]}",
            hint="apply the solution to the gradient of the block that was solved",
        )
    inverse = inverse.to(pieces.dtype)
    return inverse @ pieces if inverse.dim() == 3 else inverse[..., None] * pieces


def _ratio(problem: Problem) -> Tensor:
    """π of each group; 1 where a trace is not positive, as with zero gradients."""
    left, right = (
        _diagonal(side, low_rank=name in problem.low_rank)
        .to(problem.dtype)
        .reshape(problem.groups, -1)
        .mean(1)
        for name, side in (("left", problem.left), ("right", problem.right))
    )
    ratio = right.sqrt() / left.sqrt()
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)


def _diagonal(side: Tensor, *, low_rank: bool) -> Tensor:
    if side.dim() == 2:
        return side
    return side[:, -1] if low_rank else side.diagonal(dim1=1, dim2=2)


def _tasks(index: int, problem: Problem, ratio: Tensor, root: float) -> tuple[Inversion, ...]:
    left, right = problem.left.to(problem.dtype), problem.right.to(problem.dtype)
    dampings = (root / ratio, root * ratio)
    return tuple(
        Inversion(
            index,
            name,
            side,
            damping.repeat_interleave(len(side) // problem.groups),
            name in problem.low_rank,
        )
        for name, side, damping in zip(("left", "right"), (left, right), dampings, strict=True)
    )


def _cholesky_inverse(matrices: Tensor, damping: Tensor) -> tuple[Tensor]:
    """Inverts ``[N, d, d]`` plus damping ``[N]`` on the diagonals, overwriting the matrices."""
    # The same numbers, as they are symmetric, in the order that LAPACK works on in place.
    work = matrices.mT
    diagonals = work.diagonal(dim1=1, dim2=2)
    diagonals.add_(damping[:, None])
    info = torch.empty(len(work), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work, out=(work, info))
    failed = (info != 0)[:, None]
    # What is left of a failed factorisation may be singular, and that would raise.
    diagonals.masked_fill_(failed, 1.0)
    torch.cholesky_inverse(work, out=work)
    diagonals.masked_fill_(failed, math.nan)
    return (matrices,)


def _reciprocal(task: Inversion) -> Tensor:
    damped = task.matrix + task.damping[:, None]
    return torch.where(damped > 0, damped.reciprocal(), math.nan)
