"""Steps of this rank: its tasks, its line of the schedule, and what follows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from graphopt.errors import ArgumentError, RankError
from graphopt.plan import Phase
from graphopt.plan.partition import Stages
from graphopt.runtime.engine.step import Step
from graphopt.runtime.owned_step import OwnedStep
from graphopt.runtime.partition import flushed
from graphopt.runtime.partition.batch import MicroBatch, micro_batches
from graphopt.runtime.partition.compared import Compared
from graphopt.runtime.partition.compared_stream import ComparedStream
from graphopt.runtime.partition.engine import PipelineEngine, Visit
from graphopt.runtime.partition.loss import MEAN
from graphopt.runtime.partition.messages import Form, Messages
from graphopt.runtime.partition.rules import Rules
from graphopt.runtime.partition.shared import add_up, spread
from graphopt.runtime.partition.stream import STASH, Stream
from graphopt.runtime.partition.update import finish, renew
from graphopt.runtime.partition.whole import names_of, update_model
from graphopt.runtime.partition.work import Task, Work, engine_of
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.session import Session
from graphopt.schedules.actions import Action
from graphopt.schedules.generate import scheduled
from graphopt.schedules.transfers import with_transfers

NO_FLUSH, INTERLEAVED = "no_flush", "interleaved"
BATCH = Form((1,), (1,), torch.int64)
SAME_BATCH = "give all ranks along pp the same batch: shard the data over dp, not over all ranks"


class Steps:
    """The steps of one model on this rank.

    Args:
        session: of the model.
        owned: the model, its loss and its optimizer.
        ranks: along ``pp``.

    Attributes:
        part: the stages, once there was a step.
    """

    part: Stages

    def __init__(self, session: Session, owned: OwnedStep, ranks: Ranks) -> None:
        self.session, self.owned, self.ranks = session, owned, ranks
        self._rank = ranks.group.rank()
        self._work: Work | None = None
        self._stream: Stream | None = None
        self._lines: dict[int, tuple[Action, ...]] = {}
        self._compared: Compared | None = None

    @property
    def visit(self) -> Visit | None:
        """What a call of the model does now."""
        return None if self._work is None else self._work.visit

    def tasks(
        self,
        rules: Rules,
        batches: Sequence[MicroBatch],
        batch: Sequence[Any],
        kwargs: Mapping[str, Any],
        decided: Callable[[], Stages | None],
    ) -> list[Task]:
        """The micro-batches of a step; all that can be refused is, and nothing is sent.

        Args:
            rules: how losses add up.
            batches: into which the batch was cut.
            batch: what they were cut from.
            kwargs: keyword arguments of the model.
            decided: the stages, once a call was captured.

        Raises:
            ArgumentError: see `Partition.step`.
            RankError: ranks were given different batches.
        """
        _check_hooks(self.owned.model())
        given = (batch, kwargs)
        if self._work is not None:
            self._compare(self._work.messages, given)
        engine_of(self.owned.kind_of(batches[0].args, batches[0].kwargs))
        if self._work is None:
            part = decided()
            assert part is not None
            self.part = part
            self.ranks.agree("batches", fingerprint(given), lambda: "", SAME_BATCH)
            self._work = Work(self.session, self.owned, Messages.of(self.ranks))
            if self.session.validation is not None and part.schedule != NO_FLUSH:
                self._compared = Compared(self.session, self._work, self.ranks, part)
        if self.part.schedule == INTERLEAVED and len(batches) % self.part.ranks:
            batches = self._rounds(batches, batch, kwargs)
        rule = rules.of(batches, batch)
        tasks = [self._work.task(number, micro) for number, micro in enumerate(batches)]
        if self.part.schedule == NO_FLUSH:
            self._streaming(self._work).check(self.owned.optimizer)
            return tasks
        total = sum(task.batch.examples for task in tasks)
        for task in tasks:
            task.factor = task.batch.examples / total if rule == MEAN else 1.0
        return tasks

    def run(self, tasks: Sequence[Task], stale: bool) -> Tensor | None:
        """A step on its micro-batches; its loss.

        Args:
            tasks: the micro-batches.
            stale: whether other stages' parameters are not up to date on this rank.

        Raises:
            MismatchError: the step is not what the whole graph computes.
            RankError: a rank does not answer.
        """
        if self._stream is not None:
            return self._streamed(self._stream, tasks)
        assert self._work is not None
        compared = self._compared if self._compared and self._compared.wants(tasks) else None
        if compared is not None:
            if stale:
                update_model(self.owned.model(), self.part, self.ranks)
            compared.begin()
        ending = flushed.run(self._work, self._line(len(tasks)), tasks)
        engine, gradients, step = tasks[0].engine, ending.gradients, ending.step
        mine = set(names_of(self.part, self._rank))
        if engine.sums is not None:
            gradients.update(add_up(engine, self.ranks, ending.shares, mine))
        if engine.spread:
            gradients.update(spread(engine, self.ranks, gradients, step.parameters, mine))
        if compared is not None:
            compared.check(tasks, gradients)
        self._update(engine, step, gradients)
        self._work.messages.flush()
        losses = [task.loss * task.factor for task in tasks if task.loss is not None]
        return torch.stack(losses).sum()

    def drain(self) -> None:
        """Finish what is in flight."""
        if self._stream is not None and self.owned.optimizer is not None:
            with torch.enable_grad():
                self._stream.drain(self.owned.optimizer)
        if self._work is not None:
            self._work.messages.flush()

    def _update(self, engine: PipelineEngine, step: Step, gradients: dict[str, Tensor]) -> None:
        finish(self.session, engine, step, gradients)
        self.session.count(step)
        if step.ends and not step.skipped:
            renew(self.owned.model(), self.owned.optimizer, gradients)

    def _rounds(
        self, batches: Sequence[MicroBatch], batch: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[MicroBatch]:
        """As many micro-batches as go through the stages of a rank in whole rounds."""
        count = len(batches) - len(batches) % self.part.ranks
        if not count:
            raise ArgumentError(
                f"a batch of {len(batches)} examples has fewer micro-batches than the "
                f"{self.part.ranks} ranks of an interleaved schedule need",
                where="step",
                hint="drop incomplete batches, or take schedule=1f1b",
            )
        return micro_batches(batch, kwargs, count, has_target=self.owned.loss is not None)

    def _compare(self, messages: Messages, given: object) -> None:
        """Pass on what the batch is, and compare it with that of the rank before.

        On a GPU the answer would be waited for, so only the first batch is compared there.

        Raises:
            RankError: it is another one, as where a rank has left a step out.
        """
        if self.ranks.device.type != "cpu":
            return
        here, agreement = self._rank, self.ranks.group.agreement
        what = "the checksum of the batch"
        mine = torch.tensor([zlib.crc32(fingerprint(given).encode())])
        if self._rank + 1 < self.ranks.size:
            messages.send(Phase.FORWARD, [(BATCH, mine)], self._rank + 1, what)
        if self._rank == 0:
            return
        message = messages.ask(Phase.FORWARD, ("batch",), (BATCH,), self._rank - 1, what)
        before = messages.arrived(message)["batch"]
        if int(before) != int(mine):
            raise RankError(
                f"{agreement.named([here - 1, here])} of one pipeline were given different "
                f"batches: {agreement.named([here])} has {sizes_of(given)}",
                hint=f"{SAME_BATCH}, and leave out a batch on all of them or on none",
            )

    def _line(self, count: int) -> tuple[Action, ...]:
        if count not in self._lines:
            part = self.part
            schedule = scheduled(part.schedule, len(part.stages), part.ranks, count)
            self._lines[count] = with_transfers(schedule).ranks[self._rank]
        return self._lines[count]

    def _streaming(self, work: Work) -> Stream:
        if self._stream is None:
            stages = self.part.stages
            stage = next(i for i, s in enumerate(stages) if s.rank == self._rank)
            self._stream = Stream(
                work, stage, len(stages), self.part.weights, self.part.accumulate, self._update
            )
            if self.session.validation is not None and self.part.weights == STASH:
                parts = (self.session, work, self.ranks, self.part)
                self._stream.compared = ComparedStream(*parts)
        return self._stream

    def _streamed(self, stream: Stream, tasks: Sequence[Task]) -> Tensor | None:
        assert self.owned.optimizer is not None
        done: list[Task] = []
        if stream.compared is not None:
            stream.compared.expects(stream.number, len(tasks))
        for task, following in pairwise([*tasks, None]):
            assert task is not None
            done += stream.push(task, self.owned.optimizer, following)
        if stream.compared is not None:
            stream.compared.pushed(stream.number, stream.nominal)
        losses = [task.loss for task in done if task.loss is not None]
        return torch.stack(losses).mean() if losses else None


def _check_hooks(model: nn.Module) -> None:
    """Gradients of stages do not pass through the parameters' own hooks."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ArgumentError(
                f"{name!r} has a hook on its gradient, which steps in stages do not call",
                where="step",
                hint="remove the hook; with optimizer=None gradients are left in .grad",
            )


def sizes_of(batch: object) -> str:
    """Types and sizes of the tensors of a batch."""
    leaves = tree_flatten(batch)[0]
    return ", ".join(f"{v.dtype} {list(v.shape)}" for v in leaves if isinstance(v, Tensor))


def fingerprint(batch: object) -> str:
    """A batch in a few characters per tensor."""
    lines = []
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor):
            values: Any = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            lines.append(f"{leaf.dtype} {list(leaf.shape)} {zlib.crc32(values):08x}")
    return "\n".join(lines)
