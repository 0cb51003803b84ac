"""The way of one model's messages: a process group around the user's own.

The graph's collectives find it by name, whatever backend runs the graph. A runtime part that has to
see the messages of the graph becomes its carrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work, _register_process_group
from torch.distributed.distributed_c10d import GroupName

from graphopt.errors import RankError
from graphopt.runtime.ranks.agreement import Agreement, ranks

# Seconds in which other ranks may report that they failed, too, before one counts as missing.
GRACE = 5.0


class Channel(dist.ProcessGroup):
    """Carries the messages of one model's graphs.

    Args:
        inner: the group that does the work.
        agreement: how the ranks talk when messages do not arrive.
        name: what collectives of the graph call it.

    Attributes:
        carrier: takes each message of the graph; ``None`` to send it as it is.
    """

    def __init__(self, inner: dist.ProcessGroup, agreement: Agreement, name: str) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]
        self.inner = inner
        self.agreement = agreement
        self.channel = name
        self.carrier: Callable[[Tensor, Any], Work] | None = None
        _register_process_group(GroupName(name), self)

    def allreduce(  # type: ignore[override]
        self, tensors: Any, options: Any = None
    ) -> Work:
        """Start one message; called by the graph's collectives."""
        tensor = tensors if isinstance(tensors, Tensor) else next(iter(tensors))
        if self.carrier is not None:
            return self.carrier(tensor, options)
        return self.start(tensor, options)

    def start(self, tensor: Tensor, options: Any = None) -> Work:
        """Start to reduce a tensor in place."""
        return self.inner.allreduce([tensor], options or dist.AllreduceOptions())

    def getBackendName(self) -> str:
        """The name that torch shows."""
        return "graphopt"

    def failure(
        self, what: str, topic: str, error: BaseException, other: int | None = None
    ) -> RankError:
        """Who is missing, as far as the other ranks' reports tell.

        Args:
            what: the sentence up to the colon.
            topic: equal on all ranks that fail at the same place.
            error: what a message failed with.
            other: the only rank that had to do with the message; by default all had.
        """
        topic, among = f"failed/{topic}", None if other is None else [other]
        try:
            missing = self.agreement.missing(topic, what, GRACE, among)
            who = f"{ranks(missing)} did not answer" if missing else "no rank is missing"
            if other is not None and not missing:
                who = f"rank {other} had failed before, as {self.agreement.note(topic, other)}"
        except RuntimeError:
            who = "the job's store is gone, and with it the process that holds it"
        return RankError(
            f"{what}: {who}",
            where=str(error).splitlines()[0],
            hint="look at the output of that rank; the gradients of this step are not usable",
        )
