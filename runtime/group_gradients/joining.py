"""Ranks with unequal numbers of batches: who has none left sends zeros until all are done.

As with ``DistributedDataParallel.join``, a step is announced by a small message while this is on,
gradients are divided by the number of all ranks, and in the end all ranks have the parameters of
one that was there in the last step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _broadcast_coalesced

from graphopt.errors import ArgumentError
from graphopt.plan.group_gradients import Reduction
from graphopt.runtime.group_gradients.messages import Messages


class Joining:
    """What surrounds the steps of one loop over unequally many batches.

    Args:
        messages: of the model.
    """

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self._last = 0

    def announce(self, part: Reduction) -> None:
        """Tell ranks that have none left that this one makes a step.

        Raises:
            ArgumentError: messages depend on more than the plan, so that others cannot know them.
        """
        for option, value, plain in (
            ("wire", part.wire, ("native", "bf16")),
            ("stale", part.stale, ("none",)),
        ):
            if value not in plain:
                raise ArgumentError(
                    f"join() and {option}={value} cannot be combined",
                    hint=f"leave out {option}, or give all ranks as many batches",
                )
        self._round(active=True)

    def finish(self) -> None:
        """Send zeros as long as another rank makes steps, then take the newest parameters.

        Raises:
            RankError: a rank does not answer.
        """
        messages = self.messages
        while self._round(active=False):
            messages.shadow()
        values = [value.detach() for value in messages.parameters.values()]
        with torch.no_grad(), messages.waiting():
            _broadcast_coalesced(messages.ranks.group.inner, values, 256 << 20, self._last)

    def _round(self, *, active: bool) -> bool:
        """Whether any rank makes a step; who does so knows the number of the pass."""
        messages = self.messages
        group = messages.ranks.group
        mine = [1, messages.passes, group.rank()] if active else [0, -1, -1]
        word = torch.tensor(mine, device=messages.ranks.device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        with messages.waiting():
            group.inner.allreduce([word], options).wait()
        anybody, passes, last = word.tolist()
        if anybody:
            self._last = last
            messages.passes = passes if not active else messages.passes
        return bool(anybody)
