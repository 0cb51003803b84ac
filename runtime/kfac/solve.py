"""What a solver of Kronecker-factored blocks promises, the solvers by name, and what they share.

A solver turns the two moments of a block into a solution, which is kept while steps reuse it, and
applies that to gradients. Solutions are dictionaries of tensors, so that they can be saved and sent
like any other state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graphopt.errors import ArgumentError

Solution = dict[str, Tensor]

# A batch needs several times its size. Matrices that reach this size together gain no speed by it.
_BATCH_ELEMENTS = 2**26


@dataclass(frozen=True)
class Problem:
    """One block to be solved.

    Attributes:
        name: weight, for messages.
        left: moment G of output gradients: ``[B, d, d]`` of dense form, ``[B, d]`` of diagonal form
            or, of low rank, ``[B, r + 1, d]``: r rows R and the diagonal of what RᵀR stands for. B
            is a multiple of the groups of the weight, and B d their rows together.
        right: moment A of inputs, likewise with columns.
        samples: per use of a weight of one group, output gradients of each example
            ``[n, R, rows]`` and inputs ``[n, R, columns]`` at its R positions. Only EKFAC reads it.
        groups: matrices that the weight consists of; each has a damping ratio of its own.
        low_rank: which of ``"left"`` and ``"right"`` are of low rank.
    """

    name: str
    left: Tensor
    right: Tensor
    samples: tuple[tuple[Tensor, Tensor], ...] = ()
    groups: int = 1
    low_rank: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: at least float32."""
        return torch.promote_types(
            torch.promote_types(self.left.dtype, self.right.dtype), torch.float32
        )


class Solver(Protocol):
    """Preconditions gradients of Kronecker-factored blocks."""

    def solve(self, problems: Sequence[Problem], damping: float) -> list[Solution | None]:
        """Solves all blocks; equal sizes together.

        Args:
            problems: the blocks.
            damping: λ; positive.

        Returns:
            Per block a solution, in at least float32. Its ``damping`` (float64, no dimension) is
            the λ that worked: larger than the one asked for where that did not suffice. ``None``
            where a statistic is not finite, or no λ that was tried sufficed.

        Raises:
            ArgumentError: λ is not positive, or a statistic has an impossible shape.
        """

    def apply(self, solution: Solution, gradient: Tensor) -> Tensor:
        """Preconditions a gradient ``[groups, rows, columns]``; same shape and dtype.

        Raises:
            ArgumentError: the gradient does not fit the solution.
        """


def solver(name: str) -> Solver:
    """The solver of this name.

    Args:
        name: ``"factored"``, ``"eigen"``, ``"ekfac"`` or ``"lowrank"``.

    Raises:
        ArgumentError: there is no such solver.
    """
    # Here, as these modules import this one.
    from graphopt.runtime.kfac.eigen import Eigen
    from graphopt.runtime.kfac.ekfac import Ekfac
    from graphopt.runtime.kfac.factored import Factored
    from graphopt.runtime.kfac.lowrank import LowRank

    kinds: dict[str, type[Eigen | Ekfac | Factored | LowRank]] = {
        "factored": Factored,
        "eigen": Eigen,
        "ekfac": Ekfac,
        "lowrank": LowRank,
    }
    if name not in kinds:
        raise ArgumentError(f"there is no solver {name!r}", hint=f"use one of {', '.join(kinds)}")
    return kinds[name]()


def check_damping(damping: float) -> None:
    """Raises ArgumentError unless λ is positive and finite."""
    if not (damping > 0 and math.isfinite(damping)):
        raise ArgumentError(
            f"damping={damping} is not a positive number", hint="start with damping=1e-3"
        )


def usable(problems: Sequence[Problem]) -> list[int]:
    """Indices of the problems whose statistics are finite; waits for each device once.

    Raises:
        ArgumentError: a statistic has an impossible shape.
    """
    for problem in problems:
        for name, side in (("left", problem.left), ("right", problem.right)):
            square = side.dim() == 3 and side.shape[1] == side.shape[2]
            rows = side.dim() == 3 and name in problem.low_rank
            if side.dim() != 2 and not square and not rows:
                raise ArgumentError(
                    f"a statistic has shape {tuple(side.shape)}",
                    where=problem.name,
                    hint="pass [blocks, size, size], or [blocks, size] for a diagonal",
                )
    good = all_finite([(problem.left, problem.right) for problem in problems])
    return [index for index, is_good in enumerate(good) if is_good]


def all_finite(tensors: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Per sequence, whether every number in it is finite; waits for each device once."""
    # The least and the largest number tell the same as a mask of the size of the tensor.
    extremes: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for index, some in enumerate(tensors):
        for tensor in some:
            found = extremes.setdefault((tensor.device, tensor.dtype), [])
            found += ((index, extreme) for extreme in tensor.aminmax())
    result = [True] * len(tensors)
    for pairs in extremes.values():
        finite = torch.stack([extreme for _, extreme in pairs]).isfinite().tolist()
        for (index, _), is_finite in zip(pairs, finite, strict=True):
            result[index] &= is_finite
    return result


def in_batches(
    items: Sequence[tuple[Tensor, ...]], compute: Callable[..., tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """Computes items of equal size together.

    Args:
        items: tensors whose dimension 0 counts matrices; they are batched where the first ones
            agree in the rest of their shape, dtype and device.
        compute: takes items concatenated along dimension 0 (copies: it may overwrite them) and
            returns tensors with the same dimension 0.

    Returns:
        Per item its share of each result, in memory of its own: a share that is kept does not keep
        the rest of its batch.
    """
    groups: dict[Any, list[list[int]]] = {}
    for index, (first, *_) in enumerate(items):
        batches = groups.setdefault((first.shape[1:], first.dtype, first.device), [[]])
        filled = sum(items[i][0].numel() for i in batches[-1])
        if batches[-1] and filled + first.numel() > _BATCH_ELEMENTS:
            batches.append([])
        batches[-1].append(index)
    results: list[tuple[Tensor, ...]] = [()] * len(items)
    for members in (members for batches in groups.values() for members in batches):
        columns = zip(*(items[index] for index in members), strict=True)
        computed = compute(*(torch.cat(column) for column in columns))
        if len(members) == 1:
            results[members[0]] = computed
            continue
        counts = [len(items[index][0]) for index in members]
        shares = zip(*(torch.split(result, counts) for result in computed), strict=True)
        for index, share in zip(members, shares, strict=True):
            results[index] = tuple(part.clone() for part in share)
    return results


def on_rows(gradient: Tensor, blocks: int, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies an operation to the columns of a gradient, its rows cut into blocks.

    Args:
        gradient: shape ``[groups, rows, columns]``.
        blocks: B, a multiple of the groups.
        operation: maps ``[B, groups rows / B, columns]`` to the same shape.

    Raises:
        ArgumentError: the rows cannot be cut so.
    """
    groups, rows, columns = gradient.shape
    if blocks % groups or groups * rows % blocks:
        raise ArgumentError(
            f"a gradient of shape {tuple(gradient.shape)} cannot be cut into {blocks} blocks",
            hint="pass the gradient as [groups, rows, columns] of the block that was solved",
        )
    pieces = gradient.reshape(blocks, groups * rows // blocks, columns)
    return operation(pieces).reshape(gradient.shape)


def on_columns(gradient: Tensor, blocks: int, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """The same for columns; `operation` sees them as rows."""
    return on_rows(gradient.mT, blocks, operation).mT
