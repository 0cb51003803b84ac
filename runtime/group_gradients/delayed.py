"""Messages whose result is that of the step before: what a group keeps between two steps.

``double_buffer`` sends this step's gradients now and waits for them in the next step (ChainerMN's
double buffering); ``lag`` sends those of the step before now and waits for them at the end of this
step (gradient lag of Kurth et al., SC'18).

What is kept is part of the training state. It is handed out parameter by parameter, because a run
that continues may form other groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work

from graphopt.errors import StateError
from graphopt.runtime.group_gradients.stamp import Stamp
from graphopt.runtime.ranks.channel import Waiting

_PREFIX = "delayed/"


@dataclass
class _Held:
    """What one group keeps.

    Attributes:
        sizes: elements per key of the state, in the order of the message.
        buffer: last step's message, one-dimensional, with a stamp; ``None`` in the first step.
        work: what fills the buffer.
        number: what the buffer is stamped with.
    """

    sizes: Mapping[str, int]
    buffer: Tensor | None
    work: Any = None
    number: int = 0


class Stamps(Protocol):
    """Knows the number of the backward pass, and whether a message is of one pass."""

    number: int

    def check(self, stamp: Stamp, message: Tensor, number: int) -> Tensor:
        """A message without its stamp."""


@dataclass
class History:
    """The messages of the step before.

    Args:
        rank: of this process.
        state: where `settle` leaves messages, and where a loaded state is looked for when a group
            sends its first one.
    """

    rank: int
    state: dict[str, Tensor]
    _groups: dict[tuple[str, ...], _Held] = field(default_factory=dict)
    _own: set[str] = field(default_factory=set)

    def exchange(
        self,
        mode: str,
        sizes: Mapping[str, int],
        fresh: Tensor,
        send: Callable[[Tensor], Any],
        waiting: Callable[[], Waiting],
        stamp: Stamp,
        stamps: Stamps,
    ) -> Work:
        """Keep this step's message; waiting for the result puts the one before in its place.

        Args:
            mode: ``"double_buffer"`` or ``"lag"``.
            sizes: number of elements of each parameter of the group, in the message's order.
            fresh: the message, one-dimensional; holds the result in the end, zeros in the first
                step.
            send: starts the reduction of a tensor in place.
            waiting: makes the block in which one waits for a message.
            stamp: goes with the message when it is sent.
            stamps: knows the pass, and looks at what has arrived.

        Raises:
            StateError: the loaded state was saved by another rank.
        """
        names = tuple(sizes)
        if names not in self._groups:
            keys = {self._key(mode, name): size for name, size in sizes.items()}
            self._groups[names] = _Held(keys, self._loaded(mode, names, keys, fresh, stamp))
        held = self._groups[names]
        old, work, number = held.buffer, held.work, held.number
        mark = stamp.of(stamps.number, fresh.device)
        held.buffer = torch.cat([fresh, mark])
        held.number = stamps.number
        if mode == "double_buffer":
            held.work = send(held.buffer)
        elif old is not None:
            old[-stamp.length :] = mark
            work, number = send(old), stamps.number
        return _Late(old, work, fresh, waiting, lambda all_: stamps.check(stamp, all_, number))

    def settle(self) -> None:
        """Wait for what is under way; the state holds it then, as views that may be written to."""
        for held in self._groups.values():
            if held.work is not None:
                held.work.wait()
                held.work = None
            if held.buffer is not None:
                sizes = list(held.sizes.values())
                parts = torch.split(held.buffer[: sum(sizes)], sizes)
                self.state.update(zip(held.sizes, parts, strict=True))
                self._own.update(held.sizes)

    def _key(self, mode: str, name: str) -> str:
        # A reduced gradient is the same everywhere; one that waits to be sent is this rank's own.
        return f"{_PREFIX}{name}" + (f".rank{self.rank}" if mode == "lag" else "")

    def _loaded(
        self, mode: str, names: Sequence[str], keys: Collection[str], like: Tensor, stamp: Stamp
    ) -> Tensor | None:
        # What this run has put there itself belongs to groups that keep it anyway.
        state = {key: value for key, value in self.state.items() if key not in self._own}
        found = [state[key].to(like) for key in keys if key in state]
        if len(found) == len(keys):
            return torch.cat([*found, like.new_zeros(stamp.length)])  # with room for it
        known = _PREFIX + names[0]
        if not found and any(k == known or k.startswith(f"{known}.rank") for k in state):
            raise StateError(
                f"the loaded state holds no gradients of the step before for rank {self.rank} and "
                f"stale={mode}",
                hint="save graphopt.state_dict(model) on every rank and load each rank's own",
            )
        return None


class _Late(Work):
    """A message that was sent in the step before, or whose predecessor is sent now."""

    def __init__(
        self,
        old: Tensor | None,
        work: Any,
        fresh: Tensor,
        waiting: Callable[[], Waiting],
        body: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self._old, self._work, self._fresh = old, work, fresh
        self._waiting, self._body = waiting, body

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the result of the step before stands in the tensor; zeros where there is none."""
        if self._old is None:
            self._fresh.zero_()
            return True
        if self._work is None:  # it arrived before the state was saved
            self._fresh.copy_(self._old[: self._fresh.numel()])
            return True
        with self._waiting():
            self._work.wait()
        self._fresh.copy_(self._body(self._old))
        return True
