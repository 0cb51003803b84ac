"""`graphopt::ctc_loss`: the connectionist temporal classification loss as one operator.

    ctc_loss(Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths,
             int blank, int reduction, bool zero_infinity, ...) -> (Tensor loss, Tensor tape)
    ctc_loss.IntList: the same with lengths as ``int[]``

Parameters are those of `torch.ctc_loss` (`reduction` is 0 for none, 1 for mean, 2 for sum); it may
be batched or not. See `graphopt.ops.taped` for the remaining arguments, the backward operator and
how results stay bit-equal to eager.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.ops.record import Function
from graphopt.ops.taped import define


def _eager(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> tuple[Tensor, ...]:
    loss = torch.ctc_loss(
        log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity
    )
    return (loss,)


def _fake(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    reduction: int,
    zero_infinity: bool,
    autocast: torch.dtype | None,
) -> tuple[Tensor, ...]:
    raised = autocast is not None and log_probs.dtype.itemsize < torch.float32.itemsize
    batch = log_probs.shape[1:2] if log_probs.dim() == 3 and reduction == 0 else ()
    return (log_probs.new_empty(batch, dtype=torch.float32 if raised else log_probs.dtype),)


for _name, _lengths in (("ctc_loss", "Tensor"), ("ctc_loss.IntList", "int[]")):
    define(
        _name,
        f"Tensor log_probs, Tensor targets, {_lengths} input_lengths, {_lengths} target_lengths, "
        "int blank, int reduction, bool zero_infinity",
        1,
        Function(_eager, _fake),
    )
