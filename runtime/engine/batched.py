"""Several backwards at once: ``is_grads_batched=True``, ``jacobian(…, vectorize=True)``.

Their tangents are tensors of `torch.func.vmap`, or of the older vmap that `torch.autograd` has. The
code of a backward writes into memory, and compiled code reads it, which batched tensors do not
allow, so the backward runs once per tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]

_functorch = torch._C._functorch


@dataclass(frozen=True)
class _Batch:
    """Several tangents in one.

    Attributes:
        values: all of them, along the first dimension.
        level: of the transform.
        older: whether it is the vmap of `torch.autograd`.
    """

    values: Tensor
    level: int
    older: bool

    def like(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients in one, as these tangents are."""
        add = torch._add_batch_dim if self.older else _functorch._add_batch_dim
        return add(torch.stack(list(gradients)), 0, self.level)


def is_batched(tangents: Gradients) -> bool:
    """Whether there are several tangents in one."""
    return any(
        t is not None and (_functorch.is_batchedtensor(t) or _functorch.is_legacy_batchedtensor(t))
        for t in tangents
    )


def one_by_one(run: Callable[[Gradients], Gradients], tangents: Gradients) -> Gradients:
    """What `run` gives for each of the tangents, batched as they are.

    Args:
        run: a backward; it gives ``None`` where no tangent reaches a gradient.
        tangents: maybe batched, also several times.
    """
    batches = [_batch(tangent) for tangent in tangents]
    outer = max((b for b in batches if b is not None), key=lambda b: b.level, default=None)
    if outer is None:
        return run(tangents)
    rows = []
    for index in range(len(outer.values)):
        given = [
            batch.values[index] if batch is not None and batch.level == outer.level else tangent
            for batch, tangent in zip(batches, tangents, strict=True)
        ]
        rows.append(one_by_one(run, given))
    columns = ([g for g in column if g is not None] for column in zip(*rows, strict=True))
    return [outer.like(column) if column else None for column in columns]


def _batch(tangent: Tensor | None) -> _Batch | None:
    if tangent is None:
        return None
    if _functorch.is_batchedtensor(tangent):
        values = _functorch.get_unwrapped(tangent).movedim(_functorch.maybe_get_bdim(tangent), 0)
        return _Batch(values, _functorch.maybe_get_level(tangent), older=False)
    if _functorch.is_legacy_batchedtensor(tangent):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        return _Batch(torch._remove_batch_dim(tangent, level, 1, 0), level, older=True)
    return None
