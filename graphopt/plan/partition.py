"""Which operators run in which stage of a pipeline, and what that should take.

Nodes are named as in the graph that the plan was made for. Stages are counted from 0. Seconds and
bytes are predictions, per micro-batch where nothing else is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from graphopt.plan.limits import Count, NotNegative, OneOf, OneOrMore, Seconds, Within
from graphopt.plan.part import PlanPart

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble", "no_flush")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        rank: along ``pp``, on which it runs.
        modules: what it is made of, in order: the outermost modules that are in it as a whole;
            ``"name (part)"`` is what a module itself computes, where it is in several stages.
        forward_nodes: its operators, in the order of the graph.
        backward_nodes: those of its backward.
        parameters: names of parameters, buffers and states that its forward reads, of trained
            parameters that its backward reads, and of buffers that it writes.
        forward: seconds of its forward.
        input_grad: seconds of the gradients that the stage before waits for.
        weight_grad: seconds of the gradients of its parameters.
        saved: bytes of activations from forward to backward.
        parameter_bytes: size of what it reads.
        in_flight: micro-batches whose activations it holds at once.
        memory: bytes that it holds at most: activations, and of each trained parameter the weight,
            the gradient, one state of the optimizer and older versions where nothing is flushed.
    """

    rank: Count
    modules: tuple[str, ...]
    forward_nodes: tuple[str, ...]
    backward_nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    forward: Seconds
    input_grad: Seconds
    weight_grad: Seconds
    saved: Count
    parameter_bytes: Count
    in_flight: Count
    memory: NotNegative

    @property
    def seconds(self) -> float:
        """Seconds of forward and backward."""
        return self.forward + self.input_grad + self.weight_grad


@dataclass(frozen=True)
class Crossing:
    """A value that one stage makes and others read.

    Attributes:
        name: of its node.
        module: that computes it.
        made: the stage that makes it, or has it as an input.
        read: the stages that read it, ascending.
        relayed: the stages between that only pass it on.
        bytes: its size.
        back: whether it travels with the gradients.
    """

    name: str
    module: str
    made: Count
    read: tuple[Count, ...]
    relayed: tuple[Count, ...]
    bytes: Count
    back: bool = False

    def crosses(self, cut: int) -> bool:
        """Whether it travels between stage `cut` and the next one."""
        return min(self.made, *self.read) <= cut < max(self.made, *self.read)


@dataclass(frozen=True)
class Cut:
    """The border between a stage and the next one.

    Attributes:
        forward: seconds of what crosses it with the activations.
        backward: seconds of what comes back.
    """

    forward: Seconds
    backward: Seconds


@dataclass(frozen=True)
class Shared:
    """A trained parameter in several stages; its gradients are added up once per step.

    Attributes:
        name: of the parameter.
        stages: that use it.
        seconds: of adding up, on each of them and per step.
    """

    name: str
    stages: tuple[Count, ...]
    seconds: Seconds


@dataclass(frozen=True)
class Stages(PlanPart):
    """A step in stages.

    Attributes:
        schedule: kind of schedule, of `graphopt.schedules.generate.scheduled`.
        micro_batches: of one step; where nothing is flushed, of the run that was simulated.
        ranks: along ``pp``.
        stages: in pipeline order.
        crossings: what travels, in the order of the graph, activations first.
        cuts: between each stage and the next one.
        shared: parameters in several stages.
        sums: nodes that add up the gradients of these.
        objective: what was minimised.
        value: of the objective, in seconds.
        lower: no partition into as many stages has a smaller value, under these times.
        proof: of the bound.
        times: where the seconds of operators come from.
        link: what connects the stages.
        limit: bytes that each stage may hold; None for any.
        step: seconds of the simulated step.
        bubble: share of all ranks' time in it during which they do not compute.
        weights: which a backward sees where nothing is flushed.
        accumulate: micro-batches per update where nothing is flushed.
    """

    name: ClassVar[str] = "partition"

    schedule: Annotated[str, OneOf(SCHEDULES)]
    micro_batches: OneOrMore
    ranks: OneOrMore
    stages: tuple[Stage, ...]
    crossings: tuple[Crossing, ...]
    cuts: tuple[Cut, ...]
    shared: tuple[Shared, ...]
    sums: tuple[str, ...]
    objective: str
    value: Seconds
    lower: Seconds
    proof: str
    times: str
    link: str
    limit: NotNegative | None
    step: Seconds
    bubble: Annotated[float, Within(-1e-6, 1.0)]  # one minus a quotient
    weights: Annotated[str, OneOf(("stash", "inconsistent", "predicted"))] = "stash"
    accumulate: OneOrMore = 1

    def __post_init__(self) -> None:
        count = len(self.stages)
        for number, stage in enumerate(self.stages):
            if self.ranks and stage.rank >= self.ranks:
                raise ValueError(f"stage {number} is on rank {stage.rank} of {self.ranks}")
        numbers = [n for c in self.crossings for n in (c.made, *c.read, *c.relayed)]
        numbers += [n for shared in self.shared for n in shared.stages]
        if wrong := [n for n in numbers if n >= count]:
            raise ValueError(f"there is no stage {wrong[0]}, of {count}")
        if len(self.cuts) != max(0, count - 1):
            raise ValueError(f"{count} stages have {len(self.cuts)} cuts")

    @property
    def gap(self) -> float:
        """By which share the value may be above the best one; infinite without a bound."""
        if self.value <= self.lower:
            return 0.0
        return self.value / self.lower - 1 if self.lower > 0 else math.inf

    @property
    def stage_of(self) -> dict[str, int]:
        """The stage of each node by its name."""
        return {
            name: number
            for number, stage in enumerate(self.stages)
            for name in (*stage.forward_nodes, *stage.backward_nodes)
        }
