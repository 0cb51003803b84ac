"""Steps in stages against the whole graph: in the first step, of each kind of call, and in samples.

Each rank runs the whole step by itself, on the same batch, and compares the gradients and buffers
of its own stages before they are used. A fault in one stage shows in the stages before it, too, so
ranks exchange what they found, and the one nearest to the loss is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import MismatchError
from graphopt.plan import Role
from graphopt.plan.partition import Stages
from graphopt.runtime.engine.step import Step
from graphopt.runtime.partition import whole
from graphopt.runtime.partition.engine import PipelineEngine
from graphopt.runtime.partition.loss import loss_of, tangents_of
from graphopt.runtime.partition.messages import arriving
from graphopt.runtime.partition.reference import Reference, Streams, set_stream
from graphopt.runtime.partition.stage import InFlight, Stage
from graphopt.runtime.partition.work import Task, Work, leaves_of
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.session import Session
from graphopt.runtime.validation import NOISE, error_of, magnitude, rounding

PART = "partition"
Named = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Given:
    """One micro-batch, and what its stages had at hand.

    Attributes:
        task: the micro-batch.
        streams: where random numbers of the stages began.
        weights: parameters that take the place of the model's own.
        buffers: likewise; what earlier micro-batches have made of them, where there are none.
    """

    task: Task
    streams: Streams
    weights: Named = field(default_factory=dict)
    buffers: Named = field(default_factory=dict)


def name_of(schedule: str) -> str:
    """The form of a step, as the report has it."""
    return f"steps in stages, {schedule}"


@dataclass(frozen=True)
class Wrong:
    """What is farthest off in the last wrong stage of a rank.

    Attributes:
        stage: its number; -1 where nothing is wrong.
        rank: this one, along ``pp``.
        name: of the parameter or buffer.
        error: relative to its largest magnitude.
    """

    stage: int
    rank: int
    name: str
    error: float


class Compared:
    """Compares the steps of one model.

    Args:
        session: of the model.
        work: does the stages of this rank.
        ranks: along ``pp``.
        part: the stages.
    """

    def __init__(self, session: Session, work: Work, ranks: Ranks, part: Stages) -> None:
        self._session, self._work, self._ranks, self._part = session, work, ranks, part
        self._name = name_of(part.schedule)
        self._seen: WeakSet[PipelineEngine] = WeakSet()
        self._references: WeakKeyDictionary[PipelineEngine, Reference] = WeakKeyDictionary()
        self._mine = set(whole.names_of(part, ranks.group.rank()))
        self._before: Named = {}

    def wants(self, tasks: Sequence[Task]) -> bool:
        """Whether this step is compared; the same on all ranks, which have the same batch."""
        validation = self._session.validation
        if validation is None:
            return False
        if not validation.wants(PART, self._name, self._session.steps) and all(
            task.engine in self._seen for task in tasks
        ):
            return False
        return not any(self._reference(task.engine).draws_late for task in tasks)

    def begin(self) -> None:
        """Remember what the step will change. The model has to be up to date on all ranks."""
        self._before = {n: b.detach().clone() for n, b in self._work.owned.model().named_buffers()}
        self._work.streams = {}

    def check(self, tasks: Sequence[Task], gradients: Mapping[str, Tensor]) -> None:
        """Compare a step that is about to be used; all ranks at the same time.

        Args:
            tasks: its micro-batches.
            gradients: of this rank's stages, by name.

        Raises:
            MismatchError: it is wrong in a stage of any rank; on all of them. Buffers are what they
                were.
            RankError: a rank does not answer.
        """
        streams = self._drawn()
        model = self._work.owned.model()
        buffers = {n: b.detach() for n, b in model.named_buffers() if n in self._mine}
        given = [Given(task, streams.get(task.number, {})) for task in tasks]
        try:
            self._compare(self._name, given, gradients, buffers)
        except MismatchError:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(self._before[name])
            raise
        self._seen.update(task.engine for task in tasks)

    def _compare(
        self,
        name: str,
        given: Sequence[Given],
        gradients: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        share: float = 1.0,
    ) -> None:
        """Compare gradients and buffers of this rank with those of the whole graph.

        Args:
            name: of the form.
            given: its micro-batches.
            gradients: by name.
            buffers: what they are after the step, by name.
            share: what the gradients over all micro-batches are multiplied with.
        """
        with self._session.silently():
            sums, changed = self._whole(given)
        expected = {n: g * share for n, g in sums.items() if n in self._mine}
        held = {n: changed.get(n, self._before[n]) for n in buffers}
        worst, wrong = self._worst(given, (expected, gradients), (held, buffers))
        found = self._of_all(name, wrong)
        step, validation = self._session.steps + 1, self._session.validation
        assert validation is not None
        if found is None:
            if all(g.isfinite().all() for g in expected.values()):
                validation.found(PART, name, step, worst.name, worst.error)
            return
        guilty = self._guilty(given, sums)
        kind, _, who = guilty.partition(" ")
        raise MismatchError(
            f"{'the runtime part' if kind == 'part' else kind} {who!r} computes stage "
            f"{found.stage}, on rank {found.rank}, wrongly in step {step} ({name}): "
            f"{found.name} is not what the whole graph has, by a relative error of "
            f"{found.error:.2g}",
            hint="report it; passes without partition train in one process per replica",
            guilty=guilty,
        )

    # -- the whole step ----------------------------------------------------------------------------

    def _reference(self, engine: PipelineEngine) -> Reference:
        if engine not in self._references:
            reference = Reference(engine.module, engine.plan, engine.part.stage_of)
            self._references[engine] = reference
        return self._references[engine]

    def _drawn(self) -> dict[int, Streams]:
        """Where the random numbers of each stage began, by micro-batch, from all ranks."""
        mine, self._work.streams = self._work.streams, None
        found: list[Any] = [None] * self._ranks.size
        with arriving(self._ranks, "what the stages have drawn"):
            dist.all_gather_object(found, mine, group=self._ranks.group.inner)
        streams: dict[int, Streams] = {}
        for some in found:
            for (stage, number), state in some.items():
                streams.setdefault(number, {})[stage] = state
        return streams

    def _whole(self, given: Sequence[Given]) -> tuple[Named, Named]:
        """Gradients over all micro-batches, and what buffers are then."""
        sums: Named = {}
        buffers = dict(self._before)
        for one in given:
            gradients, changed = self._one(one, buffers | one.buffers)
            buffers.update(changed)
            _add(sums, gradients)
        return sums, buffers

    def _one(self, given: Given, buffers: Named) -> tuple[Named, Named]:
        """Gradients of one micro-batch, and the buffers that it changes."""
        reference = self._reference(given.task.engine)

        def forward(values: list[Any]) -> tuple[Any, Mapping[str, Any], Streams]:
            running = reference.forward(values, given.streams)
            return running, running.outputs, running.streams

        running, tangents = self._called(given, buffers, forward)
        return reference.backward(running, tangents)

    def _called(self, given: Given, buffers: Named, forward: Any) -> tuple[Any, Mapping[str, Any]]:
        """What a forward gave within a call of the model, and the tangents of its outputs."""
        task, work = given.task, self._work
        engine = task.engine
        replaced = {Role.BUFFER: buffers, Role.PARAM: given.weights}
        leaves: Named = {}
        results: list[Any] = []

        def visit(_: PipelineEngine, values: list[Tensor]) -> Sequence[Any]:
            slots = zip(engine.slots, values, strict=True)
            values = [replaced.get(s.role, {}).get(s.name, v) for s, v in slots]
            running, outputs, streams = forward(values)
            wanted = [s for s in engine.plan.signature.outputs if s.role is Role.OUTPUT]
            leaves.update(leaves_of(engine, {s: outputs[s.name] for s in wanted}))
            results.append(running)
            if (state := streams.get(len(self._part.stages) - 1)) is not None:
                set_stream(self._ranks.device, state)  # a loss may draw, too
            return list(leaves.values())

        work.visit = visit
        try:
            with torch.enable_grad():
                model = work.owned.model()
                output = task.kind.call(model, *task.batch.args, **task.batch.kwargs)
                loss = loss_of(work.owned.loss, output, task.batch.target)
                return results[0], tangents_of(loss, leaves, task.factor)
        finally:
            work.visit = None

    # -- what is wrong -----------------------------------------------------------------------------

    def _worst(
        self, given: Sequence[Given], *pairs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    ) -> tuple[Wrong, Wrong]:
        """What is farthest off, and what is in the last stage that is wrong."""
        rank = self._ranks.group.rank()
        worst = wrong = Wrong(-1, rank, "", 0.0)
        by_eager = given[0].task.engine.plan.backend == "eager"
        generated = not by_eager or self._ranks.device.type != "cpu"
        for reference, actual in pairs:
            allowed = rounding(reference, generated=generated)
            scales = {n: magnitude(r) for n, r in reference.items()}
            floor = NOISE * max(scales.values(), default=0.0)
            for name, value in reference.items():
                error = error_of(value, actual.get(name), max(scales[name], floor))
                found = Wrong(self._stage_of(name), rank, name, error)
                worst = max(worst, found, key=lambda f: f.error)
                if error > allowed:
                    wrong = max(wrong, found, key=lambda f: (f.stage, f.error))
        return worst, wrong

    def _stage_of(self, name: str) -> int:
        """The last stage of this rank that has a parameter or buffer."""
        stages, rank = self._part.stages, self._ranks.group.rank()
        return max(
            (i for i, s in enumerate(stages) if s.rank == rank and name in s.parameters), default=0
        )

    def _of_all(self, name: str, mine: Wrong) -> Wrong | None:
        """The wrong stage nearest to the loss, of all ranks."""
        text = json.dumps([mine.stage, mine.rank, mine.name, mine.error])
        told = self._ranks.group.agreement.collect(name, text)
        found = max((Wrong(*json.loads(one)) for one in told), key=lambda f: f.stage)
        return None if found.stage < 0 else found

    def _guilty(self, given: Sequence[Given], sums: Named) -> str:
        """The backend, where its code for the stages is wrong in one process, eager's is not."""
        engine = given[0].task.engine
        if engine.plan.backend == "eager":
            return f"part {PART}"
        alone = [one for one in given if one.task.engine is engine]
        found = []
        with self._session.silently():
            for made in (engine.stage_by_eager, engine.stage):
                stages = [made(number) for number in range(len(self._part.stages))]
                total: Named = {}
                for one in alone:
                    _add(total, self._in_turn(stages, one))
                found.append(total)
            expected = sums if len(alone) == len(given) else self._whole(alone)[0]
        once = {n: g for n, g in expected.items() if n in found[0]}
        right = [self._worst(given, (once, total))[1].error == 0.0 for total in found]
        return f"backend {engine.plan.backend}" if right == [True, False] else f"part {PART}"

    def _in_turn(self, stages: Sequence[Stage], given: Given) -> Named:
        """Gradients of one micro-batch by the halves of all stages, one after the other."""
        task, drawn = given.task, given.streams
        flights: list[InFlight] = []

        def forward(values: list[Any]) -> tuple[Any, Mapping[str, Any], Streams]:
            values = [v.clone() if isinstance(v, Tensor) else v for v in values]
            slots = zip(task.engine.slots, values, strict=True)
            named = {s.name: v for s, v in slots if s.role is Role.PARAM}
            sent: Named = {}
            for number, stage in enumerate(stages):
                if number in drawn:
                    set_stream(self._ranks.device, drawn[number])
                flight = InFlight(Step(named, task.batch.examples, False))
                sent = stage.forward(flight, values, sent)
                flights.append(flight)
            outputs = {s.name: v for s, v in flights[-1].outputs.items() if s.role is Role.OUTPUT}
            return None, outputs, {}

        _, tangents = self._called(given, self._before | given.buffers, forward)
        found: Named = {}
        received: Named = {}
        for stage, flight in zip(reversed(stages), reversed(flights), strict=True):
            arrived, received = received, {}
            for part in range(len(stage.backward_ports)):
                sent, _, results = stage.backward(flight, tangents, arrived, part)
                received = sent if part == 0 else received
                arrived = {}
                found.update(
                    {s.name: v for s, v in results.items() if s.role is Role.GRAD and v is not None}
                )
        return found


def _add(sums: Named, more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value.clone()
