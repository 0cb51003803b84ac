"""What every simulated step must hold to, on random computations, groupings and links."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from graphopt.network.curve import Curve
from graphopt.plan.grouping import Group, Ready
from graphopt.simulate import Timeline, Trace, simulate

TINY = 1e-9  # relative; re-anchoring the computation at a change of pace rounds


@dataclass(frozen=True)
class Job:
    timeline: Timeline
    groups: tuple[Group, ...]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """A computation and a partition of its gradients, contiguous or not."""
    count = draw(st.integers(0, 12))
    backward = draw(st.floats(0, 10))
    shares = [draw(st.floats(0, 1)) for _ in range(count)]
    ready = tuple(
        Ready(f"p{i}", draw(st.integers(0, 10**8)), min(backward, backward * share))
        for i, share in enumerate(shares)
    )
    owner: dict[int, list[Ready]] = {}
    for gradient in ready:
        owner.setdefault(draw(st.integers(0, 4)), []).append(gradient)
    groups = [
        Group(tuple(g.name for g in part), sum(g.bytes for g in part), "float32 cpu")
        for part in owner.values()
    ]
    order = draw(st.permutations(groups))
    return Job(Timeline(draw(st.floats(0, 10)), backward, ready), tuple(order))


latencies = st.floats(0, 1)
per_byte = st.floats(0, 1e-7)
contentions = st.floats(1, 3)
channel_counts = st.integers(1, 4)


def at_most(a: float, b: float) -> bool:
    return a <= b * (1 + TINY) + 1e-12


@given(jobs(), latencies, per_byte)
def test_is_the_analytic_recurrence(job: Job, latency: float, slope: float) -> None:
    cost = Curve.affine(latency, slope)
    seconds = {g.name: g.seconds for g in job.timeline.ready}
    finish = 0.0
    finishes = []
    for group in job.groups:
        ready = max(job.timeline.forward + seconds[name] for name in group.names)
        finish = max(finish, ready) + cost(group.bytes)
        finishes.append(finish)
    trace = simulate(job.timeline, job.groups, cost)
    assert [s.end for s in trace.spans if s.lane == "channel 0"] == finishes
    assert trace.reduced == finish
    assert trace.compute_end == job.timeline.compute
    assert trace.step == max(finish, job.timeline.compute)


@given(jobs(), latencies, per_byte, channel_counts)
def test_busy_time_is_conserved(job: Job, latency: float, slope: float, channels: int) -> None:
    cost = Curve.affine(latency, slope)
    trace = simulate(job.timeline, job.groups, cost, channels=channels)
    assert math.isclose(trace.busy("compute"), job.timeline.compute, rel_tol=TINY, abs_tol=1e-12)
    total = math.fsum(cost(group.bytes) for group in job.groups)
    assert math.isclose(trace.busy("channel"), total, rel_tol=TINY, abs_tol=1e-12)


@given(jobs(), latencies, per_byte, contentions, channel_counts)
def test_lanes_do_one_thing_at_a_time(
    job: Job, latency: float, slope: float, contention: float, channels: int
) -> None:
    trace = simulate(
        job.timeline,
        job.groups,
        Curve.affine(latency, slope),
        channels=channels,
        contention=contention,
        negotiation=lambda group: 0.01 * len(group.names),
    )
    for lane in trace.lanes:
        spans = [span for span in trace.spans if span.lane == lane]
        assert all(a.end <= b.start for a, b in pairwise(spans))
    assert len([lane for lane in trace.lanes if lane.startswith("channel")]) <= channels


@given(jobs(), latencies, per_byte, st.floats(0, 1), contentions, channel_counts)
def test_more_bandwidth_is_never_slower(
    job: Job, latency: float, slope: float, share: float, contention: float, channels: int
) -> None:
    def step(per_byte: float) -> Trace:
        cost = Curve.affine(latency, per_byte)
        return simulate(job.timeline, job.groups, cost, channels=channels, contention=contention)

    assert at_most(step(slope * share).step, step(slope).step)


@given(jobs(), latencies, per_byte, contentions, channel_counts)
def test_contention_is_never_faster(
    job: Job, latency: float, slope: float, contention: float, channels: int
) -> None:
    cost = Curve.affine(latency, slope)
    free = simulate(job.timeline, job.groups, cost, channels=channels)
    slowed = simulate(job.timeline, job.groups, cost, channels=channels, contention=contention)
    assert at_most(free.step, slowed.step)
    assert at_most(slowed.busy("compute"), contention * free.busy("compute"))


@given(jobs(), latencies, per_byte, contentions, channel_counts)
def test_another_channel_is_never_slower(
    job: Job, latency: float, slope: float, contention: float, channels: int
) -> None:
    # True because service is in order: no group can be overtaken by a later one that a new
    # channel lets in earlier.
    cost = Curve.affine(latency, slope)
    few = simulate(job.timeline, job.groups, cost, channels=channels, contention=contention)
    more = simulate(job.timeline, job.groups, cost, channels=channels + 1, contention=contention)
    assert at_most(more.step, few.step)


@given(jobs(), latencies, per_byte, contentions)
def test_no_step_beats_the_lower_bound(
    job: Job, latency: float, slope: float, contention: float
) -> None:
    # What is ready last must still travel, however it is grouped: the cost is sub-additive.
    cost = Curve.affine(latency, slope)
    late = sorted(job.timeline.ready, key=lambda g: g.seconds)
    bound = max(
        (
            job.timeline.forward + late[i].seconds + cost(sum(g.bytes for g in late[i:]))
            for i in range(len(late))
        ),
        default=0.0,
    )
    trace = simulate(job.timeline, job.groups, cost, contention=contention)
    assert at_most(max(bound, job.timeline.compute), trace.step)


@given(jobs(), latencies, st.floats(0, 0.5))
def test_negotiation_is_never_faster(job: Job, latency: float, talk: float) -> None:
    cost = Curve.affine(latency, 1e-8)
    without = simulate(job.timeline, job.groups, cost)
    with_it = simulate(job.timeline, job.groups, cost, negotiation=lambda _: talk)
    assert at_most(without.step, with_it.step)
    total = talk * len(job.groups)
    assert at_most(with_it.step, without.step + total)
    assert math.isclose(with_it.busy("negotiation"), total, rel_tol=TINY, abs_tol=1e-12)
