"""Norms whose statistics are those of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt.notices import warn


def warn_of_norms(model: nn.Module, sizes: Sequence[int]) -> None:
    """Warn of batch norms that see one example at a time.

    Args:
        model: of the step.
        sizes: examples of each micro-batch.
    """
    if len(sizes) < 2 or min(sizes) > 1:
        return
    modules = model.named_modules()
    norms = [name for name, m in modules if isinstance(m, _BatchNorm) and m.training]
    if norms:
        more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
        warn(
            f"batch norm in micro-batches of 1 example: {norms[0]!r}{more} take mean and variance "
            f"of 1 example, where the batch has {sum(sizes)}; take fewer than {len(sizes)} "
            "microbatches, or a norm of single examples, such as GroupNorm",
        )
