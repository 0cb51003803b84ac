"""EKFAC: the eigenbasis of both sides, with second moments measured in it.

George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis"
(NeurIPS 2018, arXiv 1806.03884), section 3: the divisor d_G d_Aᵀ of `eigen` is replaced by

    S_ij = mean over examples n of (q_Gᵢᵀ ∇W_n q_Aⱼ)²,    ∇W_n = Σ_r g_{n,r} a_{n,r}ᵀ

which is the best diagonal in that basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac.eigen import Eigen, rotate
from graphopt.runtime.kfac.factored import multiply
from graphopt.runtime.kfac.solve import Problem, Solution, all_finite, on_columns

# Numbers of the gradients of single examples that exist at one time.
_CHUNK = 2**22


@dataclass(frozen=True)
class Ekfac:
    """The solver.

    Its solutions are those of `Eigen` plus ``moments`` ``[rows, columns]``, S. Without samples
    there is no S, and the solution is used as that of `Eigen`.
    """

    def solve(self, problems: Sequence[Problem], damping: float) -> list[Solution | None]:
        """See `Solver.solve`.

        Raises:
            ArgumentError: also where samples do not fit their statistics.
        """
        solutions = Eigen().solve(problems, damping)
        measured: list[tuple[int, Tensor]] = []
        for index, problem in enumerate(problems):
            solution = solutions[index]
            if solution is not None and problem.samples and len(problem.samples[0][0]):
                measured.append((index, second_moments(problem, solution)))
        finite = all_finite([(moments,) for _, moments in measured])
        for (index, moments), is_finite in zip(measured, finite, strict=True):
            solution = solutions[index]
            if solution is not None:
                solutions[index] = {**solution, "moments": moments} if is_finite else None
        return solutions

    def apply(self, solution: Solution, gradient: Tensor) -> Tensor:
        """See `Solver.apply`."""
        moments = solution.get("moments")
        if moments is None:
            return Eigen().apply(solution, gradient)
        wide = gradient.to(torch.promote_types(gradient.dtype, moments.dtype))
        wide = rotate(solution, wide, inverse=False) / (moments + solution["damping"])
        return rotate(solution, wide, inverse=True).to(gradient.dtype).contiguous()


def second_moments(problem: Problem, solution: Solution) -> Tensor:
    """S of a weight of one group, shape ``[rows, columns]``.

    Gradients of examples are made a few at a time, so that memory does not grow with their number.

    Raises:
        ArgumentError: samples differ in their number, or do not fit the bases.
    """
    rows, columns = solution["left_values"].numel(), solution["right_values"].numel()
    examples = len(problem.samples[0][0])
    for outer, inner in problem.samples:
        if outer.shape[:2] != inner.shape[:2] or len(outer) != examples:
            raise ArgumentError(
                f"samples of shapes {tuple(outer.shape)} and {tuple(inner.shape)} do not belong "
                f"to {examples} examples",
                where=problem.name,
                hint="pass [examples, positions, size] of the same examples for every use",
            )
    # With one position the square of the product is the product of squares: one multiplication.
    is_single = len(problem.samples) == 1 and problem.samples[0][0].shape[1] == 1
    step = examples if is_single else max(1, _CHUNK // (rows * columns))
    total = torch.zeros(rows, columns, dtype=problem.dtype, device=problem.left.device)
    for start in range(0, examples, step):
        turned = [
            (
                _turn(outer[start : start + step].to(problem.dtype), solution, "left"),
                _turn(inner[start : start + step].to(problem.dtype), solution, "right"),
            )
            for outer, inner in problem.samples
        ]
        if is_single:
            outer, inner = (side[:, 0].square() for side in turned[0])
            total += outer.mT @ inner
            continue
        gradients = sum((outer.mT @ inner for outer, inner in turned), start=total.new_zeros(()))
        total += gradients.square_().sum(0)
    return total / examples


def _turn(samples: Tensor, solution: Solution, side: str) -> Tensor:
    """Rows ``[n, R, size]`` in the eigenbasis of a side."""
    basis = solution.get(f"{side}_basis")
    if basis is None:
        return samples
    flat = samples.reshape(1, -1, samples.shape[2])
    turned = on_columns(flat, len(basis), partial(multiply, basis.mT))
    return turned.reshape(samples.shape)
