"""Steps in stages against the whole graph: in the first step, of each kind of call, and in samples.

Each rank runs the whole step by itself, on the same batch, and compares the gradients and buffers
of its own stages before they are used. A fault in one stage shows in the stages before it, too, so
ranks exchange what they found, and the one nearest to the loss is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        with self._session.silently():
            sums, changed = self._whole(tasks, streams)
        expected = {n: g for n, g in sums.items() if n in self._mine}
        held = {n: changed.get(n, self._before[n]) for n in buffers}
        worst, wrong = self._worst(tasks, (expected, gradients), (held, buffers))
        found = self._of_all(wrong)
        step, validation = self._session.steps + 1, self._session.validation
        assert validation is not None
        if found is None:
            self._seen.update(task.engine for task in tasks)
            if all(g.isfinite().all() for g in expected.values()):
                validation.found(PART, self._name, step, worst.name, worst.error)
            return
        guilty = self._guilty(tasks, streams, sums)
        kind, _, who = guilty.partition(" ")
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(self._before[name])
        raise MismatchError(
            f"{'the runtime part' if kind == 'part' else kind} {who!r} computes stage "
            f"{found.stage}, on rank {found.rank}, wrongly in step {step} ({self._name}): "
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

    def _whole(self, tasks: Sequence[Task], streams: Mapping[int, Streams]) -> tuple[Named, Named]:
        """Gradients over all micro-batches, and what buffers are then."""
        sums: Named = {}
        buffers = dict(self._before)
        for task in tasks:
            gradients, changed = self._one(task, buffers, streams.get(task.number, {}))
            buffers.update(changed)
            for name, gradient in gradients.items():
                sums[name] = sums[name] + gradient if name in sums else gradient.clone()
        return sums, buffers

    def _one(self, task: Task, buffers: Named, streams: Streams) -> tuple[Named, Named]:
        """Gradients of one micro-batch, and the buffers that it changes."""
        reference = self._reference(task.engine)

        def forward(values: list[Any]) -> tuple[Any, Mapping[str, Any], Streams]:
            running = reference.forward(values, streams)
            return running, running.outputs, running.streams

        running, tangents = self._called(task, buffers, forward)
        return reference.backward(running, tangents)

    def _called(self, task: Task, buffers: Named, forward: Any) -> tuple[Any, Mapping[str, Any]]:
        """What a forward gave within a call of the model, and the tangents of its outputs."""
        engine, work = task.engine, self._work
        leaves: Named = {}
        given: list[Any] = []

        def visit(_: PipelineEngine, values: list[Tensor]) -> Sequence[Any]:
            values = [
                buffers.get(s.name, v) if s.role is Role.BUFFER else v
                for s, v in zip(engine.slots, values, strict=True)
            ]
            running, outputs, streams = forward(values)
            slots = [s for s in engine.plan.signature.outputs if s.role is Role.OUTPUT]
            leaves.update(leaves_of(engine, {s: outputs[s.name] for s in slots}))
            given.append(running)
            if (state := streams.get(len(self._part.stages) - 1)) is not None:
                set_stream(self._ranks.device, state)  # a loss may draw, too
            return list(leaves.values())

        work.visit = visit
        try:
            with torch.enable_grad():
                model = work.owned.model()
                output = task.kind.call(model, *task.batch.args, **task.batch.kwargs)
                loss = loss_of(work.owned.loss, output, task.batch.target)
                return given[0], tangents_of(loss, leaves, task.factor)
        finally:
            work.visit = None

    # -- what is wrong -----------------------------------------------------------------------------

    def _worst(
        self, tasks: Sequence[Task], *pairs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    ) -> tuple[Wrong, Wrong]:
        """What is farthest off, and what is in the last stage that is wrong."""
        rank = self._ranks.group.rank()
        worst = wrong = Wrong(-1, rank, "", 0.0)
        generated = tasks[0].engine.plan.backend != "eager" or self._ranks.device.type != "cpu"
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

    def _of_all(self, mine: Wrong) -> Wrong | None:
        """The wrong stage nearest to the loss, of all ranks."""
        text = json.dumps([mine.stage, mine.rank, mine.name, mine.error])
        told = self._ranks.group.agreement.collect(self._name, text)
        found = max((Wrong(*json.loads(one)) for one in told), key=lambda f: f.stage)
        return None if found.stage < 0 else found

    def _guilty(self, tasks: Sequence[Task], streams: Mapping[int, Streams], sums: Named) -> str:
        """The backend, where its code for the stages is wrong in one process, eager's is not."""
        engine = tasks[0].engine
        if engine.plan.backend == "eager":
            return f"part {PART}"
        found = []
        for made in (engine.stage_by_eager, engine.stage):
            stages = [made(number) for number in range(len(self._part.stages))]
            total: Named = {}
            with self._session.silently():
                for task in tasks:
                    if task.engine is not engine:
                        continue
                    for name, g in self._in_turn(stages, task, streams).items():
                        total[name] = total[name] + g if name in total else g.clone()
            found.append(total)
        alone = [t for t in tasks if t.engine is engine]
        with self._session.silently():
            expected = sums if len(alone) == len(tasks) else self._whole(alone, streams)[0]
        once = {n: g for n, g in expected.items() if n in found[0]}
        right = [self._worst(tasks, (once, total))[1].stage < 0 for total in found]
        return f"backend {engine.plan.backend}" if right == [True, False] else f"part {PART}"

    def _in_turn(
        self, stages: Sequence[Stage], task: Task, streams: Mapping[int, Streams]
    ) -> Named:
        """Gradients of one micro-batch by the halves of all stages, one after the other."""
        flights: list[InFlight] = []
        drawn = streams.get(task.number, {})

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

        _, tangents = self._called(task, dict(self._before), forward)
        found: Named = {}
        received: Named = {}
        for stage, flight in zip(reversed(stages), reversed(flights), strict=True):
            given, received = received, {}
            for part in range(len(stage.backward_ports)):
                sent, _, results = stage.backward(flight, tangents, given, part)
                received = sent if part == 0 else received
                given = {}
                found.update(
                    {s.name: v for s, v in results.items() if s.role is Role.GRAD and v is not None}
                )
        return found
