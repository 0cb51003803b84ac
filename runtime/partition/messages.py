"""Messages between neighbouring stages: sent without waiting, received into memory that is reused.

Activations and gradients travel through process groups of their own, so that neither waits behind
the other. A receive is posted before it is needed; what is sent is kept until it is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.plan import Phase
from graphopt.runtime.ranks.channel import Waiting
from graphopt.runtime.ranks.ranks import Ranks

# Sends that are under way before one waits for the oldest.
UNDER_WAY = 256


@dataclass(frozen=True)
class Form:
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> Form:
        """The form of a recorded value; one with gaps or overlaps is sent contiguous."""
        shape = tuple(value.shape)
        dense = torch.empty_like(value, device="meta", memory_format=torch.preserve_format)
        return cls(shape, dense.stride(), value.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(eq=False)
class Arriving:
    """A message that was asked for.

    Attributes:
        names: of its values.
        values: where they will be.
        work: of each.
        source: the rank that it comes from.
        what: in words, for errors.
    """

    names: tuple[str, ...]
    values: list[Tensor]
    work: list[Any]
    source: int
    what: str


class Messages:
    """Sends to and receives from other stages.

    Args:
        ranks: along ``pp``.
        groups: one per direction.
    """

    def __init__(self, ranks: Ranks, groups: dict[Phase, Any]) -> None:
        self.ranks = ranks
        self._groups = groups
        self._sent: deque[tuple[list[Any], list[Tensor], int, str]] = deque()
        self._free: dict[Form, list[Tensor]] = {}

    @classmethod
    def of(cls, ranks: Ranks) -> Messages:
        """Over the user's group, and one more of the same ranks for what comes back."""
        inner = ranks.group.inner
        members = dist.get_process_group_ranks(inner)
        other = dist.new_group(
            members, timeout=ranks.group.agreement.timeout, use_local_synchronization=True
        )
        return cls(ranks, {Phase.FORWARD: inner, Phase.BACKWARD: other})

    def send(self, phase: Phase, values: Sequence[tuple[Form, Tensor]], to: int, what: str) -> None:
        """Start to send values to a rank; returns at once."""
        group = self._groups[phase]
        flat = [_flat(form, value) for form, value in values]
        with arriving(self.ranks, what, to):
            work = [group.send([bytes_], to, tag) for tag, bytes_ in enumerate(flat)]
        self._sent.append((work, flat, to, what))
        while len(self._sent) > UNDER_WAY:
            self._wait_oldest()

    def ask(
        self, phase: Phase, names: Sequence[str], forms: Sequence[Form], source: int, what: str
    ) -> Arriving:
        """Ask for a message of a rank; returns at once."""
        group = self._groups[phase]
        values = [self._memory(form) for form in forms]
        with arriving(self.ranks, what, source):
            work = [
                group.recv([_flat(form, value)], source, tag)
                for tag, (form, value) in enumerate(zip(forms, values, strict=True))
            ]
        return Arriving(tuple(names), values, work, source, what)

    def arrived(self, message: Arriving) -> dict[str, Tensor]:
        """Wait for a message; its values by name.

        Raises:
            RankError: it does not come.
        """
        with arriving(self.ranks, message.what, message.source):
            for work in message.work:
                self._wait(work)
        return dict(zip(message.names, message.values, strict=True))

    def release(self, values: Sequence[Tensor]) -> None:
        """Reuse the memory of received values, which nobody reads any more."""
        for value in values:
            form = Form(tuple(value.shape), value.stride(), value.dtype)
            self._free.setdefault(form, []).append(value)

    def flush(self) -> None:
        """Wait until all that was sent is gone.

        Raises:
            RankError: it is not taken.
        """
        while self._sent:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        work, _, to, what = self._sent.popleft()
        with arriving(self.ranks, what, to):
            for one in work:
                self._wait(one)

    def _wait(self, work: Any) -> None:
        """Wait as long as the job does.

        Gloo would wait as long as its connections were made with, which `init_device_mesh` makes
        with torch's half an hour. NCCL does not block here, unless it is given a time.
        """
        if self.ranks.device.type == "cpu":
            work.wait(self.ranks.group.agreement.timeout)
        else:
            work.wait()

    def _memory(self, form: Form) -> Tensor:
        free = self._free.get(form)
        if free:
            return free.pop()
        return torch.empty_strided(
            form.shape, form.stride, dtype=form.dtype, device=self.ranks.device
        )


def arriving(ranks: Ranks, what: str, other: int | None = None) -> Waiting:
    """Within, messages along ``pp`` are waited for.

    Args:
        ranks: along ``pp``.
        what: is waited for, in words.
        other: the rank that it comes from or goes to; by default all are needed.

    Raises:
        RankError: they do not arrive; says which ranks are missing.
    """
    return ranks.group.waiting(lambda: f"{what} did not arrive", other)


def _flat(form: Form, value: Tensor) -> Tensor:
    """The bytes of a tensor that lies as its form says; a copy where it does not."""
    if value.stride() != form.stride or value.is_conj() or value.is_neg():
        laid = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=value.device)
        value = laid.copy_(value)
    return value.detach().as_strided((form.numel,), (1,)).view(torch.uint8)
