"""What makes one partition better than another, and what a stage may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from graphopt.errors import ArgumentError
from graphopt.schedules.laws import KINDS, in_flight, weight_versions

MINMAX, ALPA, GPIPE = "minmax", "alpa", "gpipe"
OBJECTIVES = (MINMAX, ALPA, GPIPE)


@dataclass(frozen=True)
class Memory:
    """What a stage holds, and how much it may hold.

    A stage holds its activations once per micro-batch in flight, and of each parameter the weight,
    and where it is trained the gradient, the optimizer's state and older versions of the weight.

    Attributes:
        limit: bytes that each stage may hold, or one number per stage.
        schedule: a kind of `graphopt.schedules.laws.KINDS`: it says how many are in flight.
        state: bytes of optimizer state per byte of parameters (1 for momentum, 2 for Adam).
        stash: whether older versions of the weights are kept where nothing is flushed.
    """

    limit: float | tuple[float, ...] = math.inf
    schedule: str = "1f1b"
    state: float = 1.0
    stash: bool = True

    def limit_of(self, stage: int) -> float:
        """Bytes that `stage` may hold."""
        return self.limit[stage] if isinstance(self.limit, tuple) else self.limit

    def in_flight(self, stages: int, stage: int, micro_batches: int) -> int:
        """Micro-batches whose activations a stage holds at once."""
        return in_flight(self.schedule, stages, stage, micro_batches)

    def copies(self, stages: int, stage: int) -> float:
        """Bytes per byte of trained parameters."""
        versions = weight_versions(self.schedule, stages, stage) if self.stash else 1
        return versions + 1 + self.state


@dataclass(frozen=True)
class Objective:
    """What to minimise over all partitions into so many stages.

    The cost of a stage is its compute, and where transfers are not overlapped also those over its
    two cuts. Where they are, each cut counts as one more resource, which takes as long as what
    crosses it forward and backward. ``"minmax"`` is the slowest of these, which sets the pace of
    1F1B and of asynchronous pipelines; its unit is seconds per micro-batch. ``"alpa"`` is the
    latency of a step, the sum over all stages and cuts plus ``M - 1`` times the slowest (Zheng et
    al. 2022). ``"gpipe"`` is the slowest forward plus the slowest backward, which count
    separately where all forwards come before all backwards (Tanaka et al. 2021).

    Attributes:
        kind: one of `OBJECTIVES`.
        micro_batches: M of one step, over which the reduction of shared gradients is spread, too.
        overlap: whether transfers run beside the computation.
        memory: what a stage may hold.
    """

    kind: str = MINMAX
    micro_batches: int = 1
    overlap: bool = True
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ArgumentError(
                f"there is no objective {self.kind!r}",
                where="objective",
                hint=f"one of {', '.join(OBJECTIVES)}",
            )
        if self.micro_batches < 1:
            raise ArgumentError(
                f"a step cannot have {self.micro_batches} micro-batches", where="micro_batches"
            )
        if self.memory.schedule not in KINDS:
            raise ArgumentError(
                f"there is no schedule {self.memory.schedule!r}",
                where="memory",
                hint=f"one of {', '.join(KINDS)}",
            )
