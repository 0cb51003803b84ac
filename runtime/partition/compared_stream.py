"""Updates of a pipeline that is never drained against the whole graph, with the weights of each.

A micro-batch meets other weights in each stage, those that the stage had then; with them its
gradient is that of the whole graph (``weights=stash``). Two updates are compared: the first whose
weights were renewed between forward and backward, and the last of the first drain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from graphopt.plan.partition import Stages
from graphopt.runtime.partition.compared import PART, Compared, Given, Named
from graphopt.runtime.partition.messages import arriving
from graphopt.runtime.partition.work import Task, Work
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.session import Session
from graphopt.schedules.laws import concurrent_delay

FILLED = "stages in flight, no_flush"
DRAINED = "a drained pipeline, no_flush"


class ComparedStream(Compared):
    """Compares updates of one model, micro-batch by micro-batch.

    Args:
        session: of the model.
        work: does the stage of this rank.
        ranks: along ``pp``.
        part: the stages.
    """

    def __init__(self, session: Session, work: Work, ranks: Ranks, part: Stages) -> None:
        super().__init__(session, work, ranks, part)
        self._every = part.accumulate
        self._behind = concurrent_delay(len(part.stages), 0)
        self._first = (self._every - 1 + self._behind) // self._every
        self._last = -1
        self._buffers: Named = {}
        self._met: dict[int, list[tuple[Task, dict[str, Any]]]] = {}
        self._gradients: dict[int, Named] = {}

    def expects(self, number: int, count: int) -> None:
        """So many micro-batches follow, from this number on.

        The drain is not foreseen, so that what could be its last update is remembered: of the last
        stage a copy of its weights and gradients in each step, until there was a drain.
        """
        self._last = (number + count - 1) // self._every if self._compares(DRAINED) else -1
        for update in list(self._met):
            if update not in (self._first, self._last):
                self._met.pop(update)
                self._gradients.pop(update, None)

    def remembers(self, task: Task) -> bool:
        """Whether the forward of a micro-batch is to be remembered."""
        update = task.number // self._every
        first = update == self._first and self._compares(FILLED)
        found = (first or update == self._last) and not self._reference(task.engine).draws_late
        self._work.streams = {} if found else None
        return found

    def forward(self, stage: int, task: Task, stashed: bool) -> None:
        """Remember what a stage had in a forward that has run.

        Args:
            stage: its number.
            task: the micro-batch.
            stashed: whether the stage keeps the weights of forwards by itself.
        """
        step, model = task.flights[stage].step, self._work.owned.model()
        weights = step.weights if stashed else dict(model.named_parameters())
        own = {n: w.detach() for n, w in weights.items() if n in self._mine}
        streams, self._work.streams = self._work.streams, None
        assert streams is not None
        met = {
            "weights": own if stashed else {n: w.clone() for n, w in own.items()},
            "buffers": self._buffers,
            "streams": {stage: state for (stage, _), state in streams.items()},
        }
        self._met.setdefault(task.number // self._every, []).append((task, met))

    def before(self) -> None:
        """A forward that is remembered follows, and changes buffers."""
        named = self._work.owned.model().named_buffers()
        self._buffers = {n: b.detach().clone() for n, b in named if n in self._mine}

    def updated(self, update: int, gradients: Mapping[str, Tensor]) -> None:
        """An update is about to be made with these gradients."""
        if update in self._met:
            self._gradients[update] = {n: g.clone() for n, g in gradients.items()}

    def pushed(self, number: int, nominal: int) -> None:
        """So many micro-batches have begun; compare, if all stages are through with the update.

        Raises:
            MismatchError: it is wrong in a stage of any rank; on all of them.
            RankError: a rank does not answer.
        """
        if number >= (self._first + 1) * self._every + self._behind and self._compares(FILLED):
            self._check(FILLED, self._first, nominal)

    def drained(self, number: int, nominal: int) -> None:
        """So many micro-batches are through, in all stages.

        Raises:
            MismatchError: an update was wrong in a stage of any rank; on all of them.
            RankError: a rank does not answer.
        """
        if number >= (self._first + 1) * self._every and self._compares(FILLED):
            self._check(FILLED, self._first, nominal)
        if number and self._compares(DRAINED):
            self._check(DRAINED, (number - 1) // self._every, nominal)
        self._met, self._gradients = {}, {}

    def _compares(self, name: str) -> bool:
        # Stages count other numbers of updates, so that none is sampled.
        validation = self._session.validation
        return validation is not None and validation.wants(PART, name, 0)

    def _check(self, name: str, update: int, nominal: int) -> None:
        remembered = self._met.pop(update, [])
        found: list[Any] = [None] * self._ranks.size
        with arriving(self._ranks, "what the stages had at hand"):
            mine = [met for _, met in remembered]
            dist.all_gather_object(found, mine, group=self._ranks.group.inner)
        if not remembered:
            return  # it draws random numbers in backward
        given = []
        for index, (task, _) in enumerate(remembered):
            merged: dict[str, Any] = {"weights": {}, "buffers": {}, "streams": {}}
            for of_rank in found:
                for what, values in of_rank[index].items():
                    merged[what].update(values)
            given.append(Given(task, merged["streams"], merged["weights"], merged["buffers"]))
        share = nominal / sum(task.batch.examples for task, _ in remembered)
        gradients = self._gradients.pop(update, {})
        self._compare(name, given, gradients, {}, share)
