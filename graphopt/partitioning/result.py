"""A partition with its times, its memory, what crosses its cuts, and how good it provably is."""

from __future__ import annotations

import math
from dataclasses import dataclass

EXACT = "exact search"


@dataclass(frozen=True)
class Stage:
    """One stage. Seconds and activation bytes are per micro-batch.

    Attributes:
        operators: names, in the order of the problem.
        forward: seconds of its forward.
        input_grad: seconds of the gradients that the stage before waits for.
        weight_grad: seconds of the gradients of its parameters.
        reduction: seconds of adding up gradients of parameters that other stages use, too, spread
            over the micro-batches.
        saved: bytes of activations that it keeps for its backward.
        parameters: names of its parameters.
        parameter_bytes: their size.
        in_flight: micro-batches whose activations it holds at once.
        memory: bytes that it holds at most.
        limit: bytes that it may hold.
    """

    operators: tuple[str, ...]
    forward: float
    input_grad: float
    weight_grad: float
    reduction: float
    saved: int
    parameters: tuple[str, ...]
    parameter_bytes: int
    in_flight: int
    memory: float
    limit: float

    @property
    def backward(self) -> float:
        """Seconds of its backward and of reductions."""
        return self.input_grad + self.weight_grad + self.reduction

    @property
    def seconds(self) -> float:
        """Seconds of forward, backward and reductions."""
        return self.forward + self.backward

    @property
    def excess(self) -> float:
        """Bytes above its limit; negative where there is room."""
        return self.memory - self.limit


@dataclass(frozen=True)
class Cut:
    """What crosses from one stage to the next, per micro-batch.

    Attributes:
        values: names; those made in earlier stages are relayed.
        bytes: of all of them.
        gradient: bytes that come back.
        forward: seconds of one transfer forward.
        backward: seconds of one transfer back.
    """

    values: tuple[str, ...]
    bytes: int
    gradient: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Shared:
    """A trained parameter that several stages use, so that its gradients are added up.

    Attributes:
        name: of the parameter.
        stages: that use it, from 0.
        seconds: of adding up, on each of them and per step.
    """

    name: str
    stages: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Certificate:
    """How far from the best a partition can be at most.

    Attributes:
        value: of the partition.
        lower: no partition into as many stages has a smaller value.
        proof: what proves the bound.
    """

    value: float
    lower: float
    proof: str

    @property
    def gap(self) -> float:
        """By which share the value may be above the best one."""
        if self.value <= self.lower:
            return 0.0
        return self.value / self.lower - 1 if self.lower > 0 else math.inf


@dataclass(frozen=True)
class Partition:
    """Operators in stages.

    Attributes:
        stages: in pipeline order.
        cuts: between each stage and the next one.
        shared: trained parameters in more than one stage.
        value: of the objective, seconds.
        method: how it was found.
        certificate: how good it provably is; None for a partition that was only evaluated.
        solve_seconds: how long finding it took.
    """

    stages: tuple[Stage, ...]
    cuts: tuple[Cut, ...]
    shared: tuple[Shared, ...]
    value: float
    method: str = ""
    certificate: Certificate | None = None
    solve_seconds: float = 0.0

    @property
    def assignment(self) -> dict[str, int]:
        """The stage of each operator by its name."""
        return {name: s for s, stage in enumerate(self.stages) for name in stage.operators}

    @property
    def slowest(self) -> float:
        """Seconds of compute of the slowest stage."""
        return max(stage.seconds for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage is within its limit of memory."""
        return all(stage.excess <= 0 for stage in self.stages)
