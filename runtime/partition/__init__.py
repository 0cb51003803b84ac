"""Run training steps in stages, each rank its own ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from graphopt import registry
from graphopt.errors import ArgumentError, RankError
from graphopt.plan import Plan
from graphopt.plan.partition import Stages
from graphopt.runtime.backends import Backend
from graphopt.runtime.engine.step import Step
from graphopt.runtime.owned_step import OwnedStep
from graphopt.runtime.part import MakeEngine, RuntimePart
from graphopt.runtime.partition import flushed, whole
from graphopt.runtime.partition.batch import MicroBatch, check_takes, micro_batches
from graphopt.runtime.partition.engine import PipelineEngine, Visit
from graphopt.runtime.partition.local import accumulated
from graphopt.runtime.partition.loss import MEAN, reduction_of
from graphopt.runtime.partition.messages import Messages
from graphopt.runtime.partition.norms import warn_of_norms
from graphopt.runtime.partition.shared import add_up, spread
from graphopt.runtime.partition.stream import Stream
from graphopt.runtime.partition.update import finish, renew
from graphopt.runtime.partition.work import Task, Work, engine_of
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.session import Session
from graphopt.schedules.actions import Action
from graphopt.schedules.generate import scheduled
from graphopt.schedules.transfers import with_transfers

NO_FLUSH = "no_flush"


class Partition(RuntimePart[Stages]):
    """The pipeline of a model.

    Attributes:
        stages: what was decided; ``None`` before the first call that trains.
    """

    name: ClassVar[str] = "partition"
    methods: ClassVar[tuple[str, ...]] = ("step", "own_state_dict")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.stages: Stages | None = None
        self._work: Work | None = None
        self._stream: Stream | None = None
        self._reductions: dict[tuple[Any, ...], str] = {}
        self._lines: dict[int, tuple[Action, ...]] = {}
        self._stale = False
        self._broken: str | None = None
        self._visit: Visit | None = None

    # -- one kind of call --------------------------------------------------------------------------

    def engine(self, part: Stages, plan: Plan, below: MakeEngine) -> MakeEngine:
        """Add to what runs a whole step how its stages run."""
        per_rank = -(-len(part.stages) // part.ranks)
        for runtime, other in self.session.parts(plan):
            if reason := runtime.unstaged(other, per_rank):
                raise ArgumentError(
                    f"{runtime.name!r} cannot work in stages: {reason}",
                    where="passes",
                    hint=f"leave {runtime.name!r} or {self.name!r} out, or take other options",
                )

        def make(module: fx.GraphModule, plan: Plan) -> Callable[..., Any]:
            self._check(part)
            backend = cast("Backend", registry.get(plan.backend, registry.BACKENDS)())
            inner = below(module, plan)
            return PipelineEngine(
                module, plan, self.session, part, inner, backend.function, self._visit_now
            )

        return make

    def _check(self, part: Stages) -> None:
        """Whether stages go with what was decided before.

        Raises:
            ArgumentError: a parameter would change its rank.
        """
        if self.stages is None:
            self.stages = part
            return
        before = {n: s.rank for s in reversed(self.stages.stages) for n in s.parameters}
        for stage in part.stages:
            for name in stage.parameters:
                if before.get(name, stage.rank) != stage.rank and not self._shared(part, name):
                    raise ArgumentError(
                        f"{name!r} is on rank {before[name]}, and this kind of call would have it "
                        f"on rank {stage.rank}",
                        where="stages",
                        hint="drop incomplete batches, so that all steps have one kind of call",
                    )

    def _shared(self, part: Stages, name: str) -> bool:
        return sum(name in stage.parameters for stage in part.stages) > 1

    # -- steps -------------------------------------------------------------------------------------

    def step(self, *batch: Any, **kwargs: Any) -> Tensor | None:
        """One training step on a batch, in micro-batches.

        All ranks along ``pp`` are given the same batch. It is cut along its first dimension. With a
        loss, the last item is the target. Without an optimizer, gradients are left in ``.grad``.

        Returns:
            The loss of the batch, as a number without a graph, on every rank. Where nothing is
            flushed: of the micro-batches whose gradients have arrived in this step, ``None`` if
            there are none yet.

        Raises:
            ArgumentError: the batch cannot be cut, the loss cannot be divided, or the optimizer
                does not go with the schedule.
            RankError: a message did not arrive; names the stages and the micro-batch.
        """
        owned = self._owned()
        self._check_unbroken("start the job again, from a checkpoint")
        with torch.enable_grad():
            ranks = self._ranks()
            batches = micro_batches(
                batch, kwargs, owned.micro_batches, has_target=owned.loss is not None
            )
            if not self._reductions:
                warn_of_norms(owned.model(), [micro.examples for micro in batches])
            if owned.loss is None:
                check_takes(owned.model(), batches[0])
            if ranks is None:
                owned.kind_of(batches[0].args, batches[0].kwargs)
                # One rank and no number of stages: there are none, only micro-batches.
                if self.stages is not None and self.stages.schedule == NO_FLUSH:
                    raise ArgumentError(
                        "a pipeline that is never drained needs ranks, and this is one process",
                        where="schedule=no_flush",
                        hint="run it with torchrun and mesh='pp=2'; to study delays in one "
                        "process, graphopt.study.PipelinedBackpropagation",
                    )
                rule = self._rule(owned, batches, batch)
                return accumulated(owned, self.session, batches, rule)
            tasks = self._tasks(owned, ranks, batches, batch, kwargs)
            try:
                return self._on_ranks(owned, ranks, tasks)
            except BaseException as error:  # the others wait for messages of this step
                self._broken = getattr(error, "message", None) or repr(error)
                raise

    def _owned(self) -> OwnedStep:
        if self.session.owned is None:
            raise ArgumentError(
                "this model is a copy, and has no loss and optimizer of its own",
                where="step",
                hint="optimize the copy with its own loss= and optimizer=",
            )
        return self.session.owned

    def _decided(
        self, owned: OwnedStep, batches: Sequence[MicroBatch]
    ) -> tuple[Stages, PipelineEngine]:
        """The stages, decided by the first micro-batch of the first step."""
        engine = engine_of(owned.kind_of(batches[0].args, batches[0].kwargs))
        assert self.stages is not None
        return self.stages, engine

    def _tasks(
        self,
        owned: OwnedStep,
        ranks: Ranks,
        batches: list[MicroBatch],
        batch: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> list[Task]:
        """The micro-batches of a step on ranks; all that can be refused is, and nothing sent."""
        # Whether a size is new depends on the batches alone, so all ranks come or none.
        ranks.agree("sizes of batches", sizes_of((batch, kwargs)), lambda: "")
        part, _ = self._decided(owned, batches)
        if self._work is None:
            ranks.agree("batches", fingerprint((batch, kwargs)), lambda: "")
            self._work = Work(self.session, owned, Messages.of(ranks))
            self._hook(owned, part, ranks)
        if part.schedule == "interleaved" and len(batches) % part.ranks:
            # It goes through the stages in rounds of as many micro-batches as there are ranks.
            whole_rounds = len(batches) - len(batches) % part.ranks
            if not whole_rounds:
                raise ArgumentError(
                    f"a batch of {len(batches)} examples has fewer micro-batches than the "
                    f"{part.ranks} ranks of an interleaved schedule need",
                    where="step",
                    hint="drop incomplete batches, or take schedule=1f1b",
                )
            batches = micro_batches(batch, kwargs, whole_rounds, has_target=owned.loss is not None)
        rule = self._rule(owned, batches, batch)
        tasks = [self._work.task(number, micro) for number, micro in enumerate(batches)]
        if part.schedule == NO_FLUSH:
            self._begin_stream(self._work, part, ranks).check(owned.optimizer)
            return tasks
        total = sum(task.batch.examples for task in tasks)
        for task in tasks:
            task.factor = task.batch.examples / total if rule == MEAN else 1.0
        return tasks

    def _on_ranks(self, owned: OwnedStep, ranks: Ranks, tasks: Sequence[Task]) -> Tensor | None:
        part, work = self.stages, self._work
        assert part is not None
        assert work is not None
        self._stale = True
        if self._stream is not None:
            return _mean(self._streamed(owned, self._stream, tasks))
        ending = flushed.run(work, self._line(part, len(tasks), ranks.group.rank()), tasks)
        engine = tasks[0].engine
        gradients, step = ending.gradients, ending.step
        mine = set(whole.names_of(part, ranks.group.rank()))
        if engine.sums is not None:
            gradients.update(add_up(engine, ranks, ending.shares, mine))
        if engine.spread:
            gradients.update(spread(engine, ranks, gradients, step.parameters, mine))
        finish(self.session, engine, step, gradients)
        work.messages.flush()
        if not step.skipped:
            renew(owned.model(), owned.optimizer, gradients)
        losses = [task.loss * task.factor for task in tasks if task.loss is not None]
        return torch.stack(losses).sum()

    def _begin_stream(self, work: Work, part: Stages, ranks: Ranks) -> Stream:
        if self._stream is None:
            stage = next(i for i, s in enumerate(part.stages) if s.rank == ranks.group.rank())
            self._stream = Stream(
                work, stage, len(part.stages), part.weights, part.accumulate, self._update
            )
        return self._stream

    def _streamed(self, owned: OwnedStep, stream: Stream, tasks: Sequence[Task]) -> list[Task]:
        assert owned.optimizer is not None
        done: list[Task] = []
        for task, following in pairwise([*tasks, None]):
            assert task is not None
            done += stream.push(task, owned.optimizer, following)
        return done

    def _update(self, engine: PipelineEngine, step: Step, gradients: dict[str, Tensor]) -> None:
        """What follows a backward where nothing is flushed."""
        owned = self._owned()
        finish(self.session, engine, step, gradients)
        if step.ends and not step.skipped:
            renew(owned.model(), owned.optimizer, gradients)

    def _line(self, part: Stages, count: int, rank: int) -> tuple[Action, ...]:
        if count not in self._lines:
            schedule = scheduled(part.schedule, len(part.stages), part.ranks, count)
            self._lines[count] = with_transfers(schedule).ranks[rank]
        return self._lines[count]

    def _rule(self, owned: OwnedStep, batches: Sequence[MicroBatch], batch: Sequence[Any]) -> str:
        """How losses of micro-batches add up, found out once per division of a batch."""
        key = tuple(micro.examples for micro in batches)
        if key not in self._reductions:
            target = None if owned.loss is None else batch[-1]
            self._reductions[key] = self._reduction(owned, batches, target)
        return self._reductions[key]

    def _reduction(self, owned: OwnedStep, batches: Sequence[MicroBatch], target: Any) -> str:
        generator = torch.Generator().manual_seed(0)
        outputs = []
        for micro in batches:
            kind = owned.kind_of(micro.args, micro.kwargs)
            made = lambda engine, _: engine.made_up(generator)  # noqa: E731
            with owned.untouched(micro.args, micro.kwargs), self._visiting(made):
                outputs.append(kind.call(owned.model(), *micro.args, **micro.kwargs))
        return reduction_of(owned.loss, outputs, [micro.target for micro in batches], target)

    @contextmanager
    def _visiting(self, visit: Visit) -> Iterator[None]:
        self._visit = visit
        try:
            yield
        finally:
            self._visit = None

    def _visit_now(self) -> Visit | None:
        return self._visit or (self._work.visit if self._work is not None else None)

    def _ranks(self) -> Ranks | None:
        ranks = self.session.ranks.get("pp")
        return None if ranks is None or ranks.size == 1 else ranks

    # -- the whole model ---------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish what is in flight, and bring the model up to date; on all ranks along ``pp``."""
        ranks, owned = self._ranks(), self.session.owned
        if ranks is None or owned is None or self.stages is None or not self._stale:
            return
        self._check_unbroken("model.own_state_dict() has the weights of this rank's stages")
        if self._stream is not None and owned.optimizer is not None:
            with torch.enable_grad():
                self._stream.drain(owned.optimizer)
        if self._work is not None:
            self._work.messages.flush()
        whole.update_model(owned.model(), self.stages, ranks)
        self._stale = False

    def joined(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the states of all stages together; a collective along ``pp``."""
        ranks = self._ranks()
        return state if ranks is None or self.stages is None else whole.joined(state, ranks)

    def _check_unbroken(self, hint: str) -> None:
        if self._broken is not None:
            raise RankError(f"an earlier step was interrupted: {self._broken}", hint=hint)

    def own_state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of this rank's stages; nothing is sent.

        All stages' together are the model's `state_dict`.
        """
        owned, ranks = self._owned(), self._ranks()
        state = owned.model().state_dict
        if ranks is None or self.stages is None:
            return dict(state())
        mine = set(whole.names_of(self.stages, ranks.group.rank()))
        named = (*owned.model().named_parameters(), *owned.model().named_buffers())
        return {name: tensor.detach() for name, tensor in named if name in mine}

    def _hook(self, owned: OwnedStep, part: Stages, ranks: Ranks) -> None:
        """Be asked when somebody looks at the model or at the optimizer's state."""
        self.session.before_call = self.settle
        reference = weakref.ref(self)

        def before(*_: Any) -> None:
            if (found := reference()) is not None:
                found.settle()

        owned.model().register_state_dict_pre_hook(before)  # type: ignore[no-untyped-call]
        optimizer = owned.optimizer
        if optimizer is None:
            return
        optimizer.register_state_dict_pre_hook(before)
        optimizer.register_state_dict_post_hook(
            lambda optimizer, state: whole.whole_state(owned.model(), optimizer, part, ranks, state)
        )
        optimizer.register_load_state_dict_post_hook(
            lambda optimizer: whole.forget_others(
                owned.model(), optimizer, part, ranks.group.rank()
            )
        )

    def notes(self) -> tuple[str, ...]:
        """What this rank does."""
        ranks = self._ranks()
        if ranks is None or self.stages is None:
            return ()
        mine = [i for i, s in enumerate(self.stages.stages) if s.rank == ranks.group.rank()]
        stages = ", ".join(map(str, mine))
        return (f"rank {ranks.group.rank()} of {ranks.size} along pp runs stage {stages}",)


def sizes_of(batch: object) -> str:
    """Types and sizes of the tensors of a batch."""
    leaves = tree_flatten(batch)[0]
    return "\n".join(f"{v.dtype} {list(v.shape)}" for v in leaves if isinstance(v, Tensor))


def fingerprint(batch: object) -> str:
    """A batch in a few characters per tensor."""
    lines = []
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor):
            sum_ = leaf.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
            lines.append(f"{leaf.dtype} {list(leaf.shape)} {int(sum_)}")
    return "\n".join(lines)


def _mean(tasks: Sequence[Task]) -> Tensor | None:
    losses = [task.loss for task in tasks if task.loss is not None]
    return torch.stack(losses).mean() if losses else None
