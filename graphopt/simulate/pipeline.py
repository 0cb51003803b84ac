"""An event-driven model of pipelines: any schedule, with the times and the memory of each stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import ArgumentError
from graphopt.partitioning.result import Partition
from graphopt.schedules.actions import TRANSFERS, Action, Kind, Schedule
from graphopt.schedules.execution import (
    gives_gradient,
    refuse_stuck,
    split_backwards,
    waits_for,
)
from graphopt.schedules.generate import scheduled
from graphopt.schedules.transfers import with_transfers, without_transfers
from graphopt.simulate.trace import Span


@dataclass(frozen=True)
class StageCost:
    """What one stage takes per micro-batch.

    Attributes:
        forward: seconds.
        input_grad: seconds of the gradient of its input.
        weight_grad: seconds of the gradients of its parameters; a whole backward takes both.
        update: seconds of one update.
        saved: bytes it keeps from forward to the end of backward.
        fixed: bytes it holds all the time.
    """

    forward: float
    input_grad: float
    weight_grad: float
    update: float = 0.0
    saved: float = 0.0
    fixed: float = 0.0

    def seconds(self, kind: Kind) -> float:
        """Seconds of a computation or an update."""
        return {
            Kind.F: self.forward,
            Kind.I: self.input_grad,
            Kind.W: self.weight_grad,
            Kind.B: self.input_grad + self.weight_grad,
            Kind.UPDATE: self.update,
        }[kind]


@dataclass(frozen=True)
class Transfer:
    """What passing on one micro-batch between two neighbouring stages takes, in seconds."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class PipelineTrace:
    """What a simulated pipeline did.

    Attributes:
        spans: in the order in which they ended; lanes are ``"rank 0"``, … and ``"link 0>1"``, …
        lanes: ranks first.
        step: seconds until everything is done.
        compute: seconds that each rank computes.
        memory: of each rank, ``(seconds, bytes)`` whenever what it holds changes.
    """

    spans: tuple[Span, ...]
    lanes: tuple[str, ...]
    step: float
    compute: tuple[float, ...]
    memory: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def overhead(self) -> float:
        """Idle time over useful time of the busiest rank: ``step / compute - 1``."""
        busiest = max(self.compute)
        return self.step / busiest - 1 if busiest > 0 else 0.0

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they do not compute."""
        whole = self.step * len(self.compute)
        return 1 - math.fsum(self.compute) / whole if whole > 0 else 0.0

    @property
    def peaks(self) -> tuple[float, ...]:
        """Bytes that each rank holds at most."""
        return tuple(max(held for _, held in steps) for steps in self.memory)

    def busy(self, lane: str) -> float:
        """Seconds during which a lane is busy."""
        return math.fsum(s.seconds for s in self.spans if s.lane == lane)


def simulate_pipeline(
    schedule: Schedule,
    stages: Sequence[StageCost],
    transfers: Sequence[Transfer] = (),
    *,
    overlap: bool = True,
) -> PipelineTrace:
    """Run a schedule.

    Args:
        schedule: with or without sends and receives.
        stages: one cost per stage.
        transfers: one per cut; by default they are free. Within a rank they always are.
        overlap: whether transfers run beside the computation: a send starts as soon as its value is
            there and the link between the two ranks is free in that direction, and receives are
            posted early. Otherwise sends and receives block both ranks, in the order of the
            schedule.

    Raises:
        ArgumentError: the numbers of costs do not fit the schedule, a time is negative or not
            finite, or ranks wait for each other.
    """
    transfers = transfers or [Transfer()] * (schedule.stages - 1)
    _check(schedule, stages, transfers)
    if overlap:
        return _Overlapped(without_transfers(schedule), stages, transfers).trace()
    return _Blocking(with_transfers(schedule), stages, transfers).trace()


def costs_of(partition: Partition) -> tuple[list[StageCost], list[Transfer]]:
    """Costs of the stages and cuts of a partition, without reductions of shared gradients."""
    stages = [
        StageCost(
            s.forward,
            s.input_grad,
            s.weight_grad,
            saved=s.saved,
            fixed=s.memory - s.saved * s.in_flight,
        )
        for s in partition.stages
    ]
    return stages, [Transfer(c.forward, c.backward) for c in partition.cuts]


def planned_pipeline(part: Mapping[str, Any]) -> PipelineTrace:
    """Run the schedule of a plan with what the plan says of its stages and cuts.

    Args:
        part: the plan part of a pass that makes stages, as data.
    """
    stages = part["stages"]
    schedule = scheduled(part["schedule"], len(stages), part["ranks"], part["micro_batches"])
    costs = [
        StageCost(
            stage["forward"],
            stage["input_grad"],
            stage["weight_grad"],
            saved=stage["saved"],
            fixed=stage["memory"] - stage["saved"] * stage["in_flight"],
        )
        for stage in stages
    ]
    return simulate_pipeline(schedule, costs, [Transfer(**cut) for cut in part["cuts"]])


class _Run:
    """The state of one simulated run."""

    def __init__(
        self, schedule: Schedule, stages: Sequence[StageCost], transfers: Sequence[Transfer]
    ) -> None:
        self.schedule, self.stages, self.transfers = schedule, stages, transfers
        self.split = split_backwards(schedule)
        self.clock = [0.0] * len(schedule.ranks)
        self.done: dict[Action, float] = {}
        self.spans: list[Span] = []

    def progress(self, step: Callable[[int, Action], bool]) -> None:
        """Let `step` do the next action of each rank until all are done or none moves."""
        place = [0] * len(self.schedule.ranks)
        moved = True
        while moved:
            moved = False
            for rank, line in enumerate(self.schedule.ranks):
                while place[rank] < len(line) and step(rank, line[place[rank]]):
                    place[rank] += 1
                    moved = True
        lines = zip(self.schedule.ranks, place, strict=True)
        refuse_stuck([list(line[p:]) for line, p in lines])

    def compute(self, rank: int, action: Action, start: float) -> float:
        """Do a computation; returns when it ends."""
        end = start + self.stages[action.stage].seconds(action.kind)
        self.clock[rank] = end
        self.done[action] = end
        self.spans.append(Span(f"rank {rank}", str(action), start, end))
        return end

    def transfer_seconds(self, action: Action) -> float:
        """Seconds of a send or of what a computation sends."""
        if action.kind in (Kind.F, Kind.SEND_F):
            return self.transfers[action.stage].forward
        return self.transfers[action.stage - 1].backward

    def trace(self) -> PipelineTrace:
        """What happened."""
        spans = tuple(sorted(self.spans, key=lambda s: (s.end, s.start, s.lane)))
        links = sorted({s.lane for s in spans if s.lane.startswith("link ")})
        ranks = [f"rank {rank}" for rank in range(len(self.schedule.ranks))]
        compute = [0.0] * len(ranks)
        for rank, line in enumerate(self.schedule.ranks):
            compute[rank] = math.fsum(
                self.stages[a.stage].seconds(a.kind) for a in line if a.kind not in TRANSFERS
            )
        return PipelineTrace(
            spans,
            (*ranks, *links),
            max((s.end for s in spans), default=0.0),
            tuple(compute),
            tuple(self._memory(rank) for rank in range(len(ranks))),
        )

    def _memory(self, rank: int) -> tuple[tuple[float, float], ...]:
        own = [s for s, r in enumerate(self.schedule.placement) if r == rank]
        held = math.fsum(self.stages[s].fixed for s in own)
        steps = [(0.0, held)]
        for action in self.schedule.ranks[rank]:
            stage = self.stages[action.stage]
            end = self.done.get(action, 0.0)
            if action.kind is Kind.F:
                held += stage.saved
                steps.append((end - stage.forward, held))
            elif action.kind in (Kind.B, Kind.W):
                held -= stage.saved
                steps.append((end, held))
        return tuple(steps)


class _Overlapped(_Run):
    """Computations wait for arrivals only."""

    def __init__(
        self, schedule: Schedule, stages: Sequence[StageCost], transfers: Sequence[Transfer]
    ) -> None:
        super().__init__(schedule, stages, transfers)
        self.link_free: dict[tuple[int, int], float] = {}
        self.arrived: dict[Action, float] = {}  # at the neighbour, by the action that computed it
        self.progress(self._step)

    def _step(self, rank: int, action: Action) -> bool:
        start = self.clock[rank]
        for needed in waits_for(action, self.schedule, self.split):
            known = self.done if needed.stage == action.stage else self.arrived
            if needed not in known:
                return False
            start = max(start, known[needed])
        self._pass_on(rank, action, self.compute(rank, action, start))
        return True

    def _pass_on(self, rank: int, action: Action, end: float) -> None:
        stage = action.stage
        if action.kind is Kind.F and stage < self.schedule.stages - 1:
            other = self.schedule.placement[stage + 1]
        elif stage > 0 and action == gives_gradient(stage, action.micro_batch, self.split):
            other = self.schedule.placement[stage - 1]
        else:
            return
        if other == rank:
            self.arrived[action] = end
            return
        # Only this rank sends over this link in this direction, in the order of its actions.
        start = max(end, self.link_free.get((rank, other), 0.0))
        arrival = start + self.transfer_seconds(action)
        self.link_free[rank, other] = self.arrived[action] = arrival
        if arrival > start:
            self.spans.append(Span(f"link {rank}>{other}", str(action), start, arrival))


class _Blocking(_Run):
    """Sends and receives are actions of both ranks at the same time."""

    def __init__(
        self, schedule: Schedule, stages: Sequence[StageCost], transfers: Sequence[Transfer]
    ) -> None:
        super().__init__(schedule, stages, transfers)
        self.offered: dict[Action, float] = {}  # when a rank stands at a send or receive
        self.progress(self._step)

    def _step(self, rank: int, action: Action) -> bool:
        if action.kind in TRANSFERS:
            return self._meet(rank, action)
        if any(n not in self.done for n in self._local(rank, action)):
            return False
        self.compute(rank, action, self.clock[rank])
        return True

    def _local(self, rank: int, action: Action) -> list[Action]:
        """What an action needs of its own rank; the rest came by receives before it."""
        needed = waits_for(action, self.schedule, self.split)
        place = self.schedule.placement
        result = []
        for n in needed:
            if place[n.stage] == rank:
                result.append(n)
            else:
                kind = Kind.RECV_F if n.stage < action.stage else Kind.RECV_B
                result.append(Action(action.stage, kind, action.micro_batch))
        return result

    def _meet(self, rank: int, action: Action) -> bool:
        partner = action.partner
        if action in self.done:  # the other side has completed it
            return True
        sent = action if action.kind in (Kind.SEND_F, Kind.SEND_B) else partner
        if action is sent and any(n not in self.done for n in self._local(rank, action)):
            return False
        self.offered.setdefault(action, self.clock[rank])
        if partner not in self.offered:
            return False
        other = self.schedule.placement[partner.stage]
        start = max(self.offered[action], self.offered[partner])
        end = start + self.transfer_seconds(sent)
        self.clock[rank] = self.clock[other] = end
        self.done[action] = self.done[partner] = end
        if end > start:
            for one, what in ((rank, action), (other, partner)):
                self.spans.append(Span(f"rank {one}", str(what), start, end))
        return True


def _check(schedule: Schedule, stages: Sequence[StageCost], transfers: Sequence[Transfer]) -> None:
    if len(stages) != schedule.stages or len(transfers) != schedule.stages - 1:
        raise ArgumentError(
            f"a schedule of {schedule.stages} stages has costs of {len(stages)} stages and "
            f"{len(transfers)} cuts",
            where="stages",
            hint="give one cost per stage and one transfer per cut",
        )
    for number, s in enumerate(stages):
        costs = (s.forward, s.input_grad, s.weight_grad, s.update, s.saved, s.fixed)
        if not all(math.isfinite(c) and c >= 0 for c in costs):
            raise ArgumentError("a cost is negative or not finite", where=f"stage {number}")
    for number, t in enumerate(transfers):
        if not all(math.isfinite(c) and c >= 0 for c in (t.forward, t.backward)):
            raise ArgumentError("a transfer is negative or not finite", where=f"cut {number}")
