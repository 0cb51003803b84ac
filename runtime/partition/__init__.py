"""Run training steps in stages, each rank its own ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from graphopt import registry
from graphopt.errors import ArgumentError, RankError
from graphopt.plan import Plan
from graphopt.plan.partition import Stages
from graphopt.runtime.backends import Backend
from graphopt.runtime.owned_step import OwnedStep
from graphopt.runtime.part import MakeEngine, RuntimePart
from graphopt.runtime.partition import whole
from graphopt.runtime.partition.batch import MicroBatch, check_takes, micro_batches
from graphopt.runtime.partition.compared import name_of
from graphopt.runtime.partition.compared_stream import DRAINED, FILLED
from graphopt.runtime.partition.engine import PipelineEngine, Visit
from graphopt.runtime.partition.local import accumulated
from graphopt.runtime.partition.norms import warn_of_norms
from graphopt.runtime.partition.rules import Rules
from graphopt.runtime.partition.steps import NO_FLUSH, Steps
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.session import Session


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
        self._steps: Steps | None = None
        self._rules: Rules | None = None
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

        if self.session.validation is not None and not self.uncompared(part):
            forms = (name_of(part.schedule),)
            for form in (FILLED, DRAINED) if part.schedule == NO_FLUSH else forms:
                self.session.validation.expect(self.name, form)

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
                        hint="keep the model in one mode while it trains, and drop incomplete "
                        "batches, so that all steps have one kind of call",
                    )

    def _shared(self, part: Stages, name: str) -> bool:
        return sum(name in stage.parameters for stage in part.stages) > 1

    def uncompared(self, part: Stages) -> Mapping[str, str]:
        """Backwards that read other weights than their forwards are no gradients of anything."""
        if part.schedule != NO_FLUSH or part.weights == "stash":
            return {}
        why = f"with weights={part.weights} a backward reads other weights than its forward"
        return {FILLED: why, DRAINED: why}

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
            batches = micro_batches(
                batch, kwargs, owned.micro_batches, has_target=owned.loss is not None
            )
            if self._rules is None:
                warn_of_norms(owned.model(), [micro.examples for micro in batches])
                self._rules = Rules(owned, self._visiting)
            if owned.loss is None:
                check_takes(owned.model(), batches[0])
            ranks = self._ranks()
            if ranks is None:
                return self._alone(owned, self._rules, batches, batch)
            if self._steps is None:
                self._steps = Steps(self.session, owned, ranks)
            steps, running = self._steps, False
            try:
                tasks = steps.tasks(self._rules, batches, batch, kwargs, lambda: self.stages)
                self._hook(owned, steps)
                stale, running = self._stale, True
                self._stale = True
                return steps.run(tasks, stale)
            except BaseException as error:  # the others wait for messages of this step
                told = getattr(error, "message", None) or repr(error)
                if running:
                    self._broken = told
                if not getattr(error, "restart", False):  # else it has said so
                    ranks.group.leave_note(told)
                raise

    def _alone(
        self,
        owned: OwnedStep,
        rules: Rules,
        batches: Sequence[MicroBatch],
        batch: Sequence[Any],
    ) -> Tensor:
        """One process; without a number of stages there are only micro-batches."""
        owned.kind_of(batches[0].args, batches[0].kwargs)
        if self.stages is not None and self.stages.schedule == NO_FLUSH:
            raise ArgumentError(
                "a pipeline that is never drained needs ranks, and this is one process",
                where="schedule=no_flush",
                hint="run it with torchrun and mesh='pp=2'; to study delays in one process, "
                "graphopt.study.PipelinedBackpropagation",
            )
        return accumulated(owned, self.session, batches, rules.of(batches, batch))

    def _owned(self) -> OwnedStep:
        if self.session.owned is None:
            raise ArgumentError(
                "this model is a copy, and has no loss and optimizer of its own",
                where="step",
                hint="optimize the copy with its own loss= and optimizer=",
            )
        return self.session.owned

    @contextmanager
    def _visiting(self, visit: Visit) -> Iterator[None]:
        self._visit = visit
        try:
            yield
        finally:
            self._visit = None

    def _visit_now(self) -> Visit | None:
        return self._visit or (self._steps.visit if self._steps is not None else None)

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
        if self._steps is not None:
            self._steps.drain()
        whole.update_model(owned.model(), self.stages, ranks)
        self._stale = False

    def joined(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the states of all stages together; a collective along ``pp``."""
        ranks = self._ranks()
        return state if ranks is None or self.stages is None else whole.joined(state, ranks)

    def _check_unbroken(self, hint: str) -> None:
        if self._broken is not None:
            text = f"an earlier step was interrupted: {self._broken}"
            raise RankError(text, hint=hint, restart=True)

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

    def _hook(self, owned: OwnedStep, steps: Steps) -> None:
        """Be asked when somebody looks at the model or at the optimizer's state."""
        if self.session.before_call is None:
            self.session.before_call = self.settle
            self.session.handles += whole.watched(owned, steps, self.settle)

    def notes(self) -> tuple[str, ...]:
        """What this rank does."""
        ranks = self._ranks()
        if ranks is None or self.stages is None:
            return ()
        mine = [i for i, s in enumerate(self.stages.stages) if s.rank == ranks.group.rank()]
        stages = ", ".join(map(str, mine))
        return (f"rank {ranks.group.rank()} of {ranks.size} along pp runs stage {stages}",)
