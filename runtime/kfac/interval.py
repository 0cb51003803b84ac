"""When a statistic is computed again: the interval rule of SP-NGD, as an exact state machine.

Osawa et al., "Scalable and Practical Natural Gradient for Large-Scale Deep Learning" (TPAMI 2020,
arXiv 2002.06015), Algorithms 1 and 2. Each statistic X is on its own. At a refresh it is compared
with its two former values X₁ (last) and X₂ (the one before), which were followed by the intervals
Δ₁ and Δ₂:

- X is not similar to X₁: Δ = max(1, ⌊Δ₁ / 2⌋);
- X is similar to X₁ but not to X₂: Δ = Δ₁;
- X is similar to both: Δ = Δ₁ + Δ₂.

The next refresh is Δ steps later. A former value that does not exist yet counts as not similar.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ops.low_rank import inner
from graphopt.plan.kfac import DENSE, LOW_RANK
from graphopt.runtime.kfac.packing import frobenius


def next_interval(
    similar_to_last: bool, similar_to_one_before: bool, last: int, before: int
) -> int:
    """Steps until the next refresh.

    Args:
        similar_to_last: whether the new statistic is similar to the last one.
        similar_to_one_before: whether it is similar to the one before the last.
        last: steps between the last refresh and this one, Δ₁; at least 1.
        before: steps between the two refreshes before, Δ₂; at least 1.
    """
    if not similar_to_last:
        return max(1, last // 2)
    return last + before if similar_to_one_before else last


@dataclass(frozen=True)
class Interval:
    """The state of the rule for one statistic; three integers, in steps.

    Attributes:
        last: interval chosen at the last refresh.
        before: interval chosen at the refresh before that.
        next: step of the next refresh.
    """

    last: int = 1
    before: int = 1
    next: int = 0

    def due(self, step: int) -> bool:
        """Whether the statistic is computed in this step; also where a step was missed."""
        return step >= self.next

    def refreshed(self, step: int, similar_to_last: bool, similar_to_one_before: bool) -> Interval:
        """The state after a refresh at `step`."""
        chosen = next_interval(similar_to_last, similar_to_one_before, self.last, self.before)
        return Interval(last=chosen, before=self.last, next=step + chosen)


def similar(
    new: Tensor, old: Tensor | None, alpha: float = 0.1, form: str = DENSE, size: int = 0
) -> Tensor:
    """Whether ``|X - Y| / |Y| < alpha`` in the Frobenius norm of the full matrices.

    False where Y is zero, as no change is small against it, and where a number is not finite.

    Args:
        new: X, shape ``[B, d (d + 1) / 2]`` of dense form, ``[B, d]`` of diagonal form, or
            ``[B, (r + 1) d]`` of low rank: then it is what stands for X.
        old: Y, same shape; ``None`` where there is none yet.
        alpha: largest change that counts as none, relative to Y.
        form: `graphopt.plan.kfac.DENSE`, `DIAGONAL` or `LOW_RANK`.
        size: d, where the form is of low rank.

    Returns:
        A boolean tensor of no dimension on the device of `new`, so that a caller with many
        statistics can wait for the device once.
    """
    if old is None:
        return torch.zeros((), dtype=torch.bool, device=new.device)
    if form == LOW_RANK:
        norm = inner(old, old, size)
        apart = inner(new, new, size) - 2 * inner(new, old, size) + norm
        return apart.abs() < alpha**2 * norm
    change: Tensor = new.to(torch.promote_types(new.dtype, torch.float32)) - old
    near: Tensor = _norm(change, form) < alpha * _norm(old, form)
    return near


def _norm(statistic: Tensor, form: str) -> Tensor:
    if form == DENSE:
        return frobenius(statistic)
    norm: Tensor = torch.linalg.vector_norm(statistic, dtype=torch.float64)
    return norm
