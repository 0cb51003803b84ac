"""A simulated step for a trace viewer: the JSON that Perfetto and ``chrome://tracing`` open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from graphopt.simulate import Span

MICRO = 1e6
PROCESS = 1


class Lanes(Protocol):
    """A simulated step: of `graphopt.simulate.trace`, or of a pipeline."""

    @property
    def lanes(self) -> tuple[str, ...]:
        """Names of all lanes, in the order in which they are shown."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """What happened on them."""


Counters = Mapping[str, Sequence[tuple[float, float]]]


def trace_events(trace: Lanes, title: str, counters: Counters | None = None) -> dict[str, object]:
    """The step in Chrome's trace event format, one thread per lane; times in microseconds.

    Args:
        trace: a simulated step.
        title: what the viewer calls the process.
        counters: by name, ``(seconds, value)`` whenever a value changes.
    """
    threads = {lane: index for index, lane in enumerate(trace.lanes, start=1)}
    events: list[dict[str, object]] = [_named("process_name", title, 0)]
    for lane, thread in threads.items():
        events.append(_named("thread_name", lane, thread))
        order = {"ph": "M", "name": "thread_sort_index", "pid": PROCESS, "tid": thread}
        events.append({**order, "args": {"sort_index": thread}})
    timed: list[tuple[float, dict[str, object]]] = []
    for span in trace.spans:
        shown = {"ph": "X", "name": span.name, "cat": span.lane.partition(" ")[0], "pid": PROCESS}
        times = {"ts": span.start * MICRO, "dur": span.seconds * MICRO}
        timed.append((span.start, {**shown, "tid": threads[span.lane], **times}))
    for name, steps in (counters or {}).items():
        for seconds, value in steps:
            counter = {"ph": "C", "name": name, "pid": PROCESS, "ts": seconds * MICRO}
            timed.append((seconds, {**counter, "args": {"value": value}}))
    events += [event for _, event in sorted(timed, key=lambda pair: pair[0])]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _named(what: str, name: str, thread: int) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": thread, "args": {"name": name}}
