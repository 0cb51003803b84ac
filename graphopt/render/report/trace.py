"""The time lines of a report for Perfetto, one process each."""

from __future__ import annotations

from graphopt.render.perfetto import trace_events
from graphopt.render.report.document import Document, TimeLine
from graphopt.simulate.trace import Span


class _Lanes:
    """A time line as `trace_events` takes it."""

    def __init__(self, line: TimeLine) -> None:
        self.lanes = line.lanes
        self.spans = tuple(Span(a.lane, a.name, a.start, a.end) for a in line.activities)


def trace_of(found: Document) -> dict[str, object]:
    """All time lines in Chrome's trace event format."""
    events: list[object] = []
    for process, line in enumerate(found.time_lines, start=1):
        title = f"{found.model}: {line.title} (predicted)"
        one = trace_events(_Lanes(line), title, line.counters)["traceEvents"]
        assert isinstance(one, list)
        events += [{**event, "pid": process} for event in one]
    return {"displayTimeUnit": "ms", "traceEvents": events}
