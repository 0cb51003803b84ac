"""The simulation: a heap of events, one computation, and channels that serve groups in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from graphopt.errors import ArgumentError
from graphopt.plan.grouping import Group, Ready
from graphopt.simulate.timeline import Timeline
from graphopt.simulate.trace import COMPUTE, NEGOTIATION, Span, Trace, channel_lane

Cost = Callable[[float], float]
"""Seconds of one collective of so many bytes, such as `graphopt.network.curve.Curve`."""
Negotiation = Callable[[Group], float]
"""Seconds that the ranks take to agree that a group is ready on all of them."""


def simulate(
    timeline: Timeline,
    groups: Sequence[Group],
    cost: Cost,
    *,
    channels: int = 1,
    contention: float = 1.0,
    negotiation: Negotiation | None = None,
) -> Trace:
    """Simulate one step.

    A group is negotiated when all its gradients are computed and the group before it is
    negotiated. It is reduced when it is negotiated, the group before it has started and a channel
    is free. Thus with one channel, no negotiation and no contention, group j is reduced at
    ``max(reduced[j - 1], ready[j]) + cost(bytes[j])``.

    Args:
        timeline: the computation of the slowest rank.
        groups: what is reduced together, in this order; all gradients, each once.
        cost: seconds of a collective by its bytes.
        channels: how many collectives run at once; each takes as long as if it were alone.
        contention: factor by which computation is slower while any channel is busy.
        negotiation: seconds of negotiation before each group; None for none.

    Raises:
        ArgumentError: the groups do not partition the gradients, or a number is out of range.
    """
    if channels < 1:
        raise ArgumentError(f"there cannot be {channels} channels", where="channels")
    if not (math.isfinite(contention) and contention >= 1):
        raise ArgumentError(
            f"communication cannot slow computation by the factor {contention}",
            where="contention",
            hint="1.0 means that it does not disturb it",
        )
    _check_partition(timeline.ready, groups)
    costs = [_seconds(cost(float(g.bytes)), "a collective", g) for g in groups]
    talks = [_seconds(negotiation(g), "a negotiation", g) if negotiation else 0.0 for g in groups]
    run = _Run(timeline, groups, costs, talks if negotiation else None, channels, contention)
    return run.until_done()


class _Run:
    """The state of one simulated step."""

    def __init__(
        self,
        timeline: Timeline,
        groups: Sequence[Group],
        costs: list[float],
        talks: list[float] | None,
        channels: int,
        contention: float,
    ) -> None:
        self.groups, self.costs, self.talks = groups, costs, talks
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.spans: list[Span] = []
        self.now = 0.0
        # Progress of the computation: `anchor[1]` seconds of work were done at time `anchor[0]`.
        self.contention = contention
        self.anchor = (0.0, 0.0)
        self.pace = 1.0
        self.version = 0
        self.milestones = deque(_milestones(timeline))
        self.span_start = 0.0
        self.group_of = {name: i for i, group in enumerate(groups) for name in group.names}
        self.missing = [len(group.names) for group in groups]
        self.computed = 0  # all groups before this one have been computed
        self.to_reduce: deque[int] = deque()
        self.talking = False
        self.free = list(range(channels))  # a heap: the lowest free channel serves first
        self.channels = channels
        self.compute_end = self.reduced = 0.0

    def until_done(self) -> Trace:
        """Process all events."""
        self._expect_milestone()
        while self.events:
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now:
                heappop(self.events)[2]()
            self._dispatch()
            self._adjust_pace()
        return Trace(tuple(self.spans), self.compute_end, self.reduced)

    def _at(self, time: float, action: Callable[[], None]) -> None:
        self.version += 1
        heappush(self.events, (time, self.version, action))

    # -- computation ---------------------------------------------------------------------------

    def _expect_milestone(self) -> None:
        if not self.milestones:
            return
        work, name, _ = self.milestones[0]
        since, done = self.anchor
        # Rounding at a change of pace must not put an event into the past.
        time = max(self.now, since + (work - done) * self.pace)
        anchor = self.anchor

        def arrive() -> None:
            if anchor is self.anchor:  # otherwise the pace has changed since
                self._compute(name)

        self._at(time, arrive)

    def _compute(self, name: str) -> None:
        _, _, gradient = self.milestones.popleft()
        if self.now > self.span_start:
            self.spans.append(Span(COMPUTE, name, self.span_start, self.now))
        self.span_start = self.compute_end = self.now
        if gradient:
            self.missing[self.group_of[name]] -= 1
        self._expect_milestone()

    def _adjust_pace(self) -> None:
        pace = self.contention if len(self.free) < self.channels else 1.0
        if pace == self.pace:
            return
        since, done = self.anchor
        self.anchor = (self.now, done + (self.now - since) / self.pace)
        self.pace = pace
        self._expect_milestone()

    # -- communication -------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self.computed < len(self.groups) and not self.missing[self.computed]:
            if self.talks is None:
                self.to_reduce.append(self.computed)
            elif self.talking:
                break
            else:
                self._negotiate(self.computed, self.talks[self.computed])
            self.computed += 1
        while self.to_reduce and self.free:
            self._reduce(self.to_reduce.popleft())

    def _negotiate(self, index: int, seconds: float) -> None:
        self.talking = True
        start = self.now

        def agree() -> None:
            self.spans.append(Span(NEGOTIATION, _label(self.groups[index]), start, self.now))
            self.talking = False
            self.to_reduce.append(index)

        self._at(start + seconds, agree)

    def _reduce(self, index: int) -> None:
        channel = heappop(self.free)
        start = self.now

        def finish() -> None:
            lane = channel_lane(channel)
            self.spans.append(Span(lane, _label(self.groups[index]), start, self.now))
            self.reduced = self.now
            heappush(self.free, channel)

        self._at(start + self.costs[index], finish)


def _milestones(timeline: Timeline) -> list[tuple[float, str, bool]]:
    """``(work, name, is a gradient)`` in the order in which the computation passes them."""
    gradients = sorted(timeline.ready, key=lambda g: g.seconds)
    return [
        (timeline.forward, "forward", False),
        *((timeline.forward + g.seconds, g.name, True) for g in gradients),
        (timeline.forward + timeline.backward, "rest of backward", False),
    ]


def _label(group: Group) -> str:
    more = len(group.names) - 1
    return group.names[0] + (f" and {more} more" if more else "")


def _seconds(value: float, what: str, group: Group) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(
            f"{what} of {group.bytes} bytes cannot take {value} s",
            where=f"the group of {_label(group)}",
            hint="look at the cost model",
        )
    return value


def _check_partition(ready: Sequence[Ready], groups: Sequence[Group]) -> None:
    wanted = {gradient.name for gradient in ready}
    seen: set[str] = set()
    for group in groups:
        if not group.names:
            raise ArgumentError("a group has no gradient", where="groups")
        for name in group.names:
            if name not in wanted or name in seen:
                problem = "is in two groups" if name in seen else "is in a group, but never ready"
                raise ArgumentError(f"the gradient of {name!r} {problem}", where="groups")
            seen.add(name)
    if left := sorted(wanted - seen):
        raise ArgumentError(
            f"the gradient of {left[0]!r} is in no group",
            where="groups",
            hint=f"put each gradient into one group; {len(left)} are in none",
        )
