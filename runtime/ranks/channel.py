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
from graphopt.runtime.ranks.agreement import LOOK, Agreement, ranks
from graphopt.runtime.ranks.store import StoreLost
from graphopt.runtime.ranks.watch import Wait, Watch

# Seconds in which other ranks may report that they failed, too, before one counts as missing.
GRACE = 3.0


class Channel(dist.ProcessGroup):
    """Carries the messages of one model's graphs.

    Args:
        inner: the group that does the work.
        agreement: how the ranks talk when messages do not arrive.
        name: what collectives of the graph call it.

    Attributes:
        watch: looks after waits that take long.
        carrier: takes each message of the graph; ``None`` to send it as it is.
    """

    def __init__(self, inner: dist.ProcessGroup, agreement: Agreement, name: str) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]
        self.inner = inner
        self.agreement = agreement
        self.channel = name
        self.watch = Watch(agreement)
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

    def waiting(
        self,
        what: str | Callable[[], str],
        topic: str,
        other: int | None = None,
        hint: str = LOOK,
    ) -> Waiting:
        """Within, a message is waited for: one that takes long is told of, a lost one is an error.

        Args:
            what: is lost then, as a sentence.
            topic: equal on all ranks that wait at the same place.
            other: the only rank that has to do with the message; by default all have.
            hint: what to try.
        """
        said = what if callable(what) else lambda: what
        return Waiting(self, Wait(said, f"failed/{topic}"), other, hint)

    def failure(
        self,
        what: str,
        topic: str,
        error: BaseException,
        other: int | None = None,
        hint: str = LOOK,
    ) -> RankError:
        """Who is missing, as far as the other ranks' reports tell.

        Args:
            what: the sentence up to the colon.
            topic: equal on all ranks that fail at the same place.
            error: what a message failed with.
            other: the only rank that had to do with the message; by default all had.
            hint: what to try.
        """
        topic, among = f"failed/{topic}", None if other is None else [other]
        try:
            missing = self.agreement.missing(topic, what, GRACE, among)
            who = f"{ranks(missing)} did not answer" if missing else "no rank is missing"
            if other is not None and not missing:
                who = f"rank {other} {self.agreement.note(topic, other)}"
        except StoreLost as lost:
            known = self.watch.missing(topic)
            if not known:
                return self.agreement.lost(what, lost)
            who = f"{ranks(known)} did not answer"
        return RankError(
            f"{what}: {who}", where=str(error).splitlines()[0], hint=hint, restart=True
        )


class Waiting:
    """A block that waits for a message."""

    def __init__(self, channel: Channel, wait: Wait, other: int | None, hint: str) -> None:
        self._channel, self._wait, self._other, self._hint = channel, wait, other, hint

    def __enter__(self) -> None:
        self._channel.watch.wait = self._wait

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._channel.watch.wait = None
        if isinstance(error, RuntimeError):
            wait = self._wait
            topic = wait.topic.removeprefix("failed/")
            raise self._channel.failure(
                wait.what(), topic, error, self._other, self._hint
            ) from error
