"""The ranks of a running job, as `optimize` and the passes see them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, _broadcast_coalesced
from torch.distributed.distributed_c10d import _world

from graphopt.errors import ArgumentError, RankError
from graphopt.network.curve import Curve
from graphopt.runtime.accumulation import Accumulation
from graphopt.runtime.ranks.agreement import Agreement
from graphopt.runtime.ranks.channel import Channel
from graphopt.runtime.ranks.link import measure
from graphopt.runtime.ranks.link_cache import describe, find, keep

if TYPE_CHECKING:
    from graphopt.runtime.kfac.together import Division

_numbers = count()
# How rank 0 says that it kept no curve.
_NONE = "none"


@dataclass
class Workers(Accumulation):
    """One model's view of the default process group.

    Attributes:
        line: carries the collectives of the model's graphs.
        device: where its messages lie.
        kept: gradients of micro-batches that wait for the integer wire.
        kept_names: those of them that are gradients of this rank's loss, not zeros for want of one.
        pending: whether a backward that did not reduce has run since the last one that did.
        division: who owns which block of the curvature; ``None`` before there is any.
    """

    line: Channel
    device: torch.device
    pending: bool = False
    kept: list[dict[str, torch.Tensor]] = field(default_factory=list, repr=False)
    kept_names: set[str] = field(default_factory=set, repr=False)
    division: Division | None = field(default=None, repr=False)
    _decisions: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)
    _copies: Iterator[int] = field(default_factory=count, repr=False)

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
        """Measured cost of a message: what rank 0 kept of an earlier run, or its fit now."""
        if ("link", "") not in self._decisions:
            agreement = self.line.agreement
            agreement.tell("shape", describe(self.line.inner, self.device))
            kept = self.agree("kept link", "", lambda: _text(find(agreement.told("shape"))))
            if kept == _NONE:
                mine = measure(self.line.inner, self.device)
                self.agree("link", "", lambda: _text(mine))
                if self.line.rank() == 0:
                    keep(agreement.told("shape"), mine)
            else:
                self._decisions["link", ""] = kept
        points, source, joining = json.loads(self._decisions["link", ""])
        return Curve(tuple((size, time) for size, time in points), source, joining)

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

    def settle(self, state: dict[str, torch.Tensor]) -> None:
        """Wait for results that belong to the next step; `state` holds them then.

        What is written into `state` afterwards counts as if this run had computed it.

        Raises:
            RankError: they did not arrive.
        """
        try:
            self.line.history.settle(state)
        except RuntimeError as error:
            raise RankError(
                f"the gradients for step {self.line.step + 1} did not arrive",
                where=str(error).splitlines()[0],
                hint="look at the output of the other ranks, and resume from an earlier state",
            ) from error

    def copy(self) -> Workers:
        """The same ranks for a copy of the model, with messages and counters of its own.

        Decisions are shared, so that a copy that lives on one rank only asks nobody about what the
        original has settled. A copy that is trained must be trained on all ranks.
        """
        line = self.line
        name = f"{line.channel}.{next(self._copies)}"
        own = Channel(line.inner, line.agreement, name)
        workers = Workers(own, self.device, _decisions=self._decisions)
        if self.division is not None:
            workers.division = self.division.copy(workers)
        return workers

    def whole(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What all ranks keep of a model's state together; to be called on all of them.

        Raises:
            StateError: within a step.
            RankError: a rank does not answer.
        """
        return state if self.division is None else self.division.whole(state)

    def notes(self) -> tuple[str, ...]:
        """Lines for the report: gradient noise, and what was not finite."""
        line = self.line
        noise = line.noise.value
        found = f"{noise:.4g} examples, over {line.noise.steps} measured steps" if noise else ""
        scale = (f"gradient noise scale: {found}",) if found else ()
        sent = () if self.division is None else self.division.notes()
        return scale + sent + tuple(f"not finite: {place}" for place in line.nonfinite[:3])


def _text(curve: Curve | None) -> str:
    return _NONE if curve is None else json.dumps([curve.points, curve.source, curve.joining])
