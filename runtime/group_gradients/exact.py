"""Accumulated gradients over the integer wire.

A float sum of micro-batches depends on which rank added which of them. Here the gradients of every
micro-batch wait, each on its own, until the step that reduces; then all become integers of one
common exponent, whose sum no order changes. This costs the memory of one set of gradients per
waiting micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import graphopt.ops.wire  # noqa: F401  (defines the operators)
from graphopt.plan.grouping import Group
from graphopt.runtime.group_gradients.messages import Messages
from graphopt.runtime.group_gradients.stamp import Stamp

ops = torch.ops.graphopt


@torch.no_grad()
def reduce(
    messages: Messages, groups: Sequence[Group], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The mean over ranks of the sum over this rank's micro-batches, by parameter.

    Args:
        messages: to the ranks; all of them must have as many micro-batches, which the number of the
            backward pass shows.
        groups: which gradients share a message.
        batches: gradients of each micro-batch, by parameter.

    Raises:
        RankError: a rank has another number of micro-batches, or does not answer.
    """
    world = messages.ranks.size
    contributions = world * len(batches)
    reduced: dict[str, Tensor] = {}
    for index, group in enumerate(groups):
        parts = [[batch[name] for name in group.names] for batch in batches]
        largest = torch.stack([ops.magnitudes(part) for part in parts]).amax(0)
        if index == 0:  # as in the message of a step without accumulated gradients
            stamp = Stamp(0, largest.dtype, world, messages.ranks.group.rank(), maximum=True)
            largest = torch.cat([largest, stamp.of(messages.number, largest.device)])
        _all_reduce(messages, index, largest, dist.ReduceOp.MAX)
        if index == 0:
            largest = messages.check(stamp, largest, messages.number)
        words = ops.to_wire(parts[0], largest, contributions)
        for part in parts[1:]:
            words += ops.to_wire(part, largest, contributions)
        _all_reduce(messages, index, words, dist.ReduceOp.SUM)
        means = ops.from_wire(words, largest, parts[0], contributions, world)
        reduced.update(zip(group.names, means, strict=True))
    return reduced


def _all_reduce(messages: Messages, group: int, tensor: Tensor, operation: Any) -> None:
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    with messages.waiting(group):
        messages.ranks.group.start(tensor, options).wait()
