"""The ranks of one mesh dimension, as `optimize`, the passes and the runtime parts see them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, _broadcast_coalesced
from torch.distributed.distributed_c10d import _world

from graphopt.errors import ArgumentError
from graphopt.network.curve import Curve
from graphopt.runtime.ranks.agreement import LOOK, SAME_MODEL, Agreement
from graphopt.runtime.ranks.channel import Channel
from graphopt.runtime.ranks.link import measure_link
from graphopt.runtime.ranks.link_cache import describe, find, keep
from graphopt.runtime.ranks.notes import Notes
from graphopt.runtime.ranks.silent import silences
from graphopt.runtime.ranks.store import Store

_numbers = count()
# How rank 0 says that it kept no curve.
_NONE = "none"
_NO_LINK = f"{LOOK}, or name a link: link=10gbe"


@dataclass
class Ranks:
    """One model's view of a process group.

    Attributes:
        group: carries the messages of the model's graphs.
        device: where messages lie.
    """

    group: Channel
    device: torch.device
    _decisions: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)
    _copies: Iterator[int] = field(default_factory=count, repr=False)

    @classmethod
    def of(cls, model: nn.Module, group: dist.ProcessGroup) -> Ranks:
        """The ranks of a process group, for a model.

        Raises:
            ArgumentError: the parameters lie on several kinds of device.
        """
        named = [*model.named_parameters(), *model.named_buffers()]
        kinds = {t.device.type: name for name, t in named}
        if len(kinds) > 1:
            places = ", ".join(f"{name} on {kind}" for kind, name in kinds.items())
            raise ArgumentError(
                f"the parameters lie on several kinds of device: {places}",
                hint="move the model with model.to(device) before optimizing it",
            )
        number = next(_numbers)
        device = named[0][1].device if named else torch.device("cpu")
        timeout = group._get_backend(device).options._timeout
        store = PrefixStore(f"graphopt/{number}", _world.pg_map[group][1])
        shared = Store(store, timeout.total_seconds())
        silent = silences(group, timeout.total_seconds())
        members = dist.get_process_group_ranks(group)
        noted = _job_notes(timeout.total_seconds())
        agreement = Agreement(shared, group.rank(), group.size(), timeout, silent, noted, members)
        return cls(Channel(group, agreement, f"graphopt.{number}"), device)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    @property
    def channel(self) -> str:
        """Name under which the graph's collectives find these ranks."""
        return self.group.channel

    def link(self) -> Curve:
        """Measured cost of a message: what rank 0 kept of an earlier run, or its fit now."""
        if ("link", "") not in self._decisions:
            agreement = self.group.agreement
            agreement.tell("shape", describe(self.group.inner, self.device))
            kept = self.agree("link cache", "", lambda: _text(find(agreement.told("shape"))))
            if kept == _NONE:
                with self.group.waiting("the link was not measured", hint=_NO_LINK):
                    mine = measure_link(self.group.inner, self.device)
                self.agree("link", "", lambda: _text(mine))
                if self.group.rank() == 0:
                    keep(agreement.told("shape"), mine)
            else:
                self._decisions["link", ""] = kept
        points, source, joining = json.loads(self._decisions["link", ""])
        return Curve(tuple((size, time) for size, time in points), source, joining)

    def agree(
        self, topic: str, mine: str, decide: Callable[[], str], hint: str = SAME_MODEL
    ) -> str:
        """Rank 0's decision, once `mine` was found equal on all ranks; else ``RankError``.

        What was agreed once holds: a rank that captures again, because only its batch has another
        shape, must not wait for the others.
        """
        if (topic, mine) not in self._decisions:
            decision = self.group.agreement.agree(topic, mine, decide, hint)
            self._decisions[topic, mine] = decision
        return self._decisions[topic, mine]

    def complaint(self, topic: str, mine: str) -> tuple[int, str]:
        """The first rank that has something to say, and what; -1 where all are content.

        Raises:
            RankError: a rank did not come.
        """
        told = self.group.agreement.collect(topic, mine)
        return next(((rank, text) for rank, text in enumerate(told) if text), (-1, ""))

    def settle(self, topic: str) -> None:
        """Note that there is nothing more to agree on."""
        self._decisions[topic, ""] = ""

    def agreed_on(self, topic: str) -> bool:
        """Whether there was an agreement on this, whatever it was."""
        return any(about == topic for about, _ in self._decisions)

    def together(self, topic: str, mine: str, run: Callable[[Callable[[Tensor], Any]], str]) -> str:
        """Rank 0's result of what all ranks run at the same time, once; else as `agree`.

        Args:
            topic: as of `agree`.
            mine: as of `agree`.
            run: is given what starts to add up a tensor over all ranks.

        Raises:
            RankError: a message failed.
        """
        if (topic, mine) not in self._decisions:
            with self.group.waiting(f"the {topic} cannot be tried out"):
                found = run(lambda tensor: self.group.inner.allreduce([tensor]))
            self.agree(topic, mine, lambda: found)
        return self._decisions[topic, mine]

    def start(self, model: nn.Module) -> None:
        """Give all ranks rank 0's parameters and buffers, after a look whether they fit.

        Raises:
            RankError: the models of two ranks differ, or a rank did not come.
        """
        tensors = [*model.named_parameters(), *model.named_buffers()]
        known = "\n".join(
            f"{name} {t.dtype} {list(t.shape)}{'' if t.requires_grad else ' fixed'}"
            for name, t in tensors
        )
        self.agree("models", known, lambda: "")
        if tensors:
            with torch.no_grad():
                values = [t.detach() for _, t in tensors]
                with self.group.waiting("the parameters of rank 0 did not arrive"):
                    _broadcast_coalesced(self.group.inner, values, 256 << 20, 0)

    def copy(self) -> Ranks:
        """The same ranks for a copy of the model, with messages of its own.

        Decisions are shared, so that a copy that lives on one rank only asks nobody about what the
        original has settled. A copy that is trained must be trained on all ranks.
        """
        name = f"{self.channel}.{next(self._copies)}"
        own = Channel(self.group.inner, self.group.agreement, name)
        return Ranks(own, self.device, _decisions=self._decisions)


def _job_notes(timeout: float) -> Notes:
    """Who waits for whom, among all ranks of the job."""
    world = dist.group.WORLD
    assert world is not None, "a group of ranks needs a job"
    store = PrefixStore("graphopt", _world.pg_map[world][1])
    return Notes(Store(store, timeout), dist.get_rank(), dist.get_world_size())


def _text(curve: Curve | None) -> str:
    return _NONE if curve is None else json.dumps([curve.points, curve.source, curve.joining])
