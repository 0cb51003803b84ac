"""Which gradients travel together, as plain data.

All times are seconds since the backward pass began. Times of communication are those of one
channel that carries one group after the other, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.plan.limits import Count, OneOrMore, Seconds


@dataclass(frozen=True)
class Ready:
    """One gradient that has to be reduced.

    Attributes:
        name: qualified name of the parameter.
        bytes: size on the wire.
        seconds: when the backward pass has produced it.
        kind: dtype and device type (``"float32 cpu"``); groups never mix kinds.
        module: qualified name of the module that owns the parameter.
    """

    name: str
    bytes: Count
    seconds: Seconds
    kind: str = "float32 cpu"
    module: str = ""


@dataclass(frozen=True)
class Group:
    """Gradients that are reduced by one collective, in this order.

    Attributes:
        names: qualified names of the parameters.
        bytes: size of the message.
        kind: dtype and device type of all members.
        ready: predicted time at which the last member is ready.
        finish: predicted time at which the reduction is done.
    """

    names: tuple[str, ...]
    bytes: Count
    kind: str
    ready: Seconds = 0.0
    finish: Seconds = 0.0


@dataclass(frozen=True)
class Candidate:
    """Another way of grouping, scored with the same costs.

    Attributes:
        name: ``"ddp default"``, ``"uniform 4 MiB"``, ``"one group"``, ``"per layer"``,
            ``"mg-wfbp"``, …
        sizes: bytes of each group, in order.
        finish: predicted time at which the last group is reduced.
    """

    name: str
    sizes: tuple[Count, ...]
    finish: Seconds


@dataclass(frozen=True)
class Grouping:
    """All groups of one backward pass, with what they were weighed against.

    Attributes:
        groups: in the order in which they are reduced.
        backward: predicted duration of the backward pass without communication.
        finish: predicted time at which the last group is reduced.
        bound: no plan of contiguous groups can finish earlier, for sub-additive costs.
        candidates: other plans, scored alike; never one that is predicted faster.
        link: where the costs of a message come from.
        times: where the ready times come from: ``"measured"`` or ``"roofline"``.
        world: number of ranks.
    """

    groups: tuple[Group, ...]
    backward: Seconds
    finish: Seconds
    bound: Seconds
    candidates: tuple[Candidate, ...] = ()
    link: str = ""
    times: str = ""
    world: OneOrMore = 1

    @property
    def exposed(self) -> float:
        """Seconds of communication that no computation hides."""
        return max(0.0, self.finish - self.backward)
