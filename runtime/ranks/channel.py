"""The way of one model's messages: a process group around the user's own.

The graph's collectives find it by name, whatever backend runs the graph. A runtime part that has to
see the messages of the graph becomes its carrier.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work, _register_process_group
from torch.distributed.distributed_c10d import GroupName

from graphopt.errors import RankError
from graphopt.runtime.ranks.agreement import LOOK, Agreement, ranks
from graphopt.runtime.ranks.notes import Found
from graphopt.runtime.ranks.store import StoreLost
from graphopt.runtime.ranks.watch import Wait, Watch


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
        self._all = tuple(agreement.members)
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
        self, what: str | Callable[[], str], other: int | None = None, hint: str = LOOK
    ) -> Waiting:
        """Within, a message is waited for: one that takes long is told of, a lost one is an error.

        Args:
            what: is lost then, as a sentence.
            other: the only rank that has to do with the message; by default all have.
            hint: what to try.
        """
        on = self._all if other is None else (self._all[other],)
        return Waiting(self, what if callable(what) else lambda: what, on, hint)

    def leave_note(self, what: str) -> None:
        """Have others that wait for this rank know with which error of its own it ends."""
        with contextlib.suppress(StoreLost):
            notes = self.agreement.notes
            notes.failed((), what)
            notes.leave("notes", notes.size)

    def failure(self, wait: Wait, error: BaseException, hint: str) -> RankError:
        """Who is missing, as far as the other ranks' notes tell.

        Args:
            wait: what has failed.
            error: what it failed with.
            hint: what to try.
        """
        notes, what = self.agreement.notes, wait.what()
        on = [rank for rank in wait.on if rank != notes.rank]
        try:
            notes.failed(on, what)
            found = notes.find(on)
            who = _who(on, found)
            if not found.lost:
                with contextlib.suppress(StoreLost):
                    notes.leave("notes", notes.size)
        except StoreLost as lost:
            if not notes.verdict:
                return self.agreement.lost(what, lost)
            who = f"{ranks(notes.verdict)} did not answer"
        return RankError(
            f"{what}: {who}", where=str(error).splitlines()[0], hint=hint, restart=True
        )


def _who(on: list[int], found: Found) -> str:
    """Who is to blame where these ranks were waited for."""
    lost, notes = found.lost, found.notes
    if lost:
        between = [r for r in on if r not in lost]
        if set(lost) & set(on) or not between:
            return f"{ranks(lost)} did not answer"
        waiting = f"{ranks(between)} {'wait' if len(between) > 1 else 'waits'}"
        return f"{ranks(lost)} did not answer, for which {waiting}"
    for rank in found.culprits():
        return f"rank {rank} had failed before: {notes[rank].what}"
    if len(on) == 1 and on[0] in notes:
        return f"rank {on[0]} waits itself, or {notes[on[0]].what}"
    return "no rank is missing"


class Waiting(Wait):
    """A block that waits for a message."""

    __slots__ = ("_channel", "_hint", "_watch")

    def __init__(
        self, channel: Channel, what: Callable[[], str], on: tuple[int, ...], hint: str
    ) -> None:
        self.what, self.on, self._hint = what, on, hint
        self._channel, self._watch = channel, channel.watch

    def __enter__(self) -> None:
        self.begun, self.over = time.monotonic(), False
        watch = self._watch
        watch.wait = self
        if watch.thread is None and len(self._channel.agreement.members) > 1:
            watch.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.over = True
        if error is not None and isinstance(error, RuntimeError):
            raise self._channel.failure(self, error, self._hint) from error
