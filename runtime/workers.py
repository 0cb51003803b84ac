"""The ranks of a running job, as `optimize` and the passes see them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, _broadcast_coalesced
from torch.distributed.distributed_c10d import _world

from graphopt.errors import ArgumentError
from graphopt.network.curve import Curve
from graphopt.runtime.agreement import Agreement
from graphopt.runtime.channel import Channel
from graphopt.runtime.link import measure

_numbers = count()


@dataclass
class Workers:
    """One model's view of the default process group.

    Attributes:
        line: carries the collectives of the model's graphs.
        device: where its messages lie.
        synchronise: whether the backward of the forward passes made now reduces gradients.
        kept: gradients of micro-batches that wait for the integer wire.
        pending: whether a backward that did not reduce has run since the last one that did.
    """

    line: Channel
    device: torch.device
    synchronise: bool = True
    pending: bool = False
    kept: list[dict[str, torch.Tensor]] = field(default_factory=list, repr=False)
    _link: Curve | None = field(default=None, repr=False)
    _decisions: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, *, one: bool = False) -> Workers | None:
        """The workers of a job with more than one rank (or `one`); ``None`` elsewhere.

        Raises:
            ArgumentError: the parameters lie on several kinds of device.
        """
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if group is None or (group.size() == 1 and not one):
            return None
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
        agreement = Agreement(store, group.rank(), group.size(), timeout)
        return cls(Channel(group, agreement, f"graphopt.{number}"), device)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.line.size()

    @property
    def channel(self) -> str:
        """Name under which the graph's collectives find this job."""
        return self.line.channel

    def link(self) -> Curve:
        """Measured cost of a message; rank 0's fit, on all ranks."""
        if self._link is None:
            mine = measure(self.line.inner, self.device)
            text = self.agree("link", "", lambda: json.dumps([mine.points, mine.source]))
            points, source = json.loads(text)
            self._link = Curve(tuple((size, time) for size, time in points), source)
        return self._link

    def agree(self, topic: str, mine: str, decide: Callable[[], str]) -> str:
        """Rank 0's decision, once `mine` was found equal on all ranks; else ``RankError``.

        What was agreed once holds: a rank that captures again, because only its batch has another
        shape, must not wait for the others.
        """
        if (topic, mine) not in self._decisions:
            decision = self.line.agreement.agree(topic, mine, decide)
            self._decisions[topic, mine] = decision
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
                _broadcast_coalesced(self.line.inner, values, 256 << 20, 0)

    def notes(self) -> tuple[str, ...]:
        """Lines for the report: gradient noise, and what was not finite."""
        line = self.line
        noise = line.noise.value
        found = f"{noise:.4g} examples, over {line.noise.steps} measured steps" if noise else ""
        scale = (f"gradient noise scale: {found}",) if found else ()
        return scale + tuple(f"not finite: {place}" for place in line.nonfinite[:3])

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within, forward passes are made whose backward does not communicate."""
        before, self.synchronise = self.synchronise, False
        try:
            yield
        finally:
            self.synchronise = before
