"""A simulated step for a trace viewer: the JSON that Perfetto and ``chrome://tracing`` open."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.simulate import Trace

MICRO = 1e6
PROCESS = 1


def trace_events(trace: Trace, title: str) -> dict[str, object]:
    """The step in Chrome's trace event format, one thread per lane; times in microseconds.

    Args:
        trace: a simulated step.
        title: what the viewer calls the process.
    """
    threads = {lane: index for index, lane in enumerate(trace.lanes, start=1)}
    events: list[dict[str, object]] = [_named("process_name", title, 0)]
    for lane, thread in threads.items():
        events.append(_named("thread_name", lane, thread))
        order = {"ph": "M", "name": "thread_sort_index", "pid": PROCESS, "tid": thread}
        events.append({**order, "args": {"sort_index": thread}})
    for span in sorted(trace.spans, key=lambda s: s.start):
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.lane.partition(" ")[0],
                "pid": PROCESS,
                "tid": threads[span.lane],
                "ts": span.start * MICRO,
                "dur": span.seconds * MICRO,
            }
        )
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _named(what: str, name: str, thread: int) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": thread, "args": {"name": name}}
