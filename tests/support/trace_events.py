"""The published rules of Chrome's trace event format, as far as a reader depends on them.

From "Trace Event Format", which Perfetto's importer of JSON reads: the fields that each phase of
event needs, times in microseconds, complete events of one thread nest, begin and end events and
flows pair, and tracks are named by metadata.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]
_NAMES = {"process_name": str, "thread_name": str, "thread_sort_index": int}
_ARGUMENT = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}
_NEEDS = {"X": ("tid", "ts", "dur"), "B": ("tid", "ts"), "E": ("tid", "ts"), "C": ("ts", "args")}
_NEEDS |= dict.fromkeys("stf", ("tid", "ts", "id"))
ROUNDING = 1e-6  # of a microsecond: sums of seconds as floating-point numbers


def problems(trace: dict[str, Any]) -> list[str]:
    """What a trace does that the format does not allow, or that a viewer cannot show."""
    found = []
    if trace.get("displayTimeUnit") not in ("ms", "ns"):
        found.append("displayTimeUnit is neither ms nor ns")
    events = trace["traceEvents"]
    for number, event in enumerate(events):
        found += [f"event {number}: {said}" for said in _fields(event)]
    if not found:
        found += [*_tracks(events), *_nesting(events), *_pairs(events), *_order(events)]
    return found


def _fields(event: Event) -> Iterator[str]:
    phase = event.get("ph")
    if not (isinstance(event.get("name"), str) and event["name"]):
        yield "it has no name"
    if not isinstance(event.get("pid"), int):
        yield "it is of no process"
    if phase == "M":
        kind = _NAMES.get(event.get("name", ""))
        if kind is None:
            yield "unknown metadata"
        elif not isinstance(event["args"].get(_ARGUMENT[event["name"]]), kind):
            yield "metadata without its argument"
        return
    if phase not in _NEEDS:
        yield f"phase {phase!r} is unknown"
        return
    for field in _NEEDS[phase]:
        if field not in event:
            yield f"it has no {field}"
    for field in ("ts", "dur"):
        value = event.get(field, 0)
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            yield f"{field} is {value!r}"
    if phase == "C":
        values = event.get("args", {}).values()
        if not values or not all(isinstance(v, int | float) for v in values):
            yield "a counter without numbers"


def _tracks(events: list[Event]) -> Iterator[str]:
    named: dict[str, dict[Any, list[str]]] = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event["name"] in named and event["ph"] == "M":
            key = event["pid"] if event["name"] == "process_name" else (event["pid"], event["tid"])
            named[event["name"]].setdefault(key, []).append(event["args"]["name"])
    for keys in named.values():
        yield from (f"{key} has several names" for key, names in keys.items() if len(names) > 1)
    for event in events:
        if event["ph"] == "M":
            continue
        if event["pid"] not in named["process_name"]:
            yield f"process {event['pid']} has no name"
        if event["ph"] != "C" and (event["pid"], event["tid"]) not in named["thread_name"]:
            yield f"track {event['tid']} of process {event['pid']} has no name"
    threads = [(pid, names[0]) for (pid, _), names in named["thread_name"].items()]
    if len(set(threads)) < len(threads):
        yield "two tracks of one process have the same name"


def _nesting(events: list[Event]) -> Iterator[str]:
    """Complete events of one thread lie beside or within each other."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    for of_one in threads.values():
        open_: list[float] = []
        for event in sorted(of_one, key=lambda e: (e["ts"], -e["dur"])):
            start, end = event["ts"], event["ts"] + event["dur"]
            while open_ and open_[-1] <= start + ROUNDING:
                open_.pop()
            if open_ and end > open_[-1] + ROUNDING:
                yield f"{event['name']} overlaps what runs before it on its track"
            open_.append(end)


def _pairs(events: list[Event]) -> Iterator[str]:
    begun: dict[Any, list[str]] = defaultdict(list)
    flows: dict[Any, str] = {}
    for event in events:
        thread = event["pid"], event.get("tid")
        if event["ph"] == "B":
            begun[thread].append(event["name"])
        elif event["ph"] == "E" and (not begun[thread] or begun[thread].pop() != event["name"]):
            yield f"{event['name']} ends and has not begun"
        elif event["ph"] in "stf":
            before = flows.get(event["id"], "")
            if (event["ph"] == "s") == bool(before) or before == "f":
                yield f"flow {event['id']}: {event['ph']} behind {before or 'nothing'}"
            flows[event["id"]] = event["ph"]
    yield from (f"{names[-1]} has no end" for names in begun.values() if names)
    yield from (f"flow {key} has no end" for key, phase in flows.items() if phase != "f")


def _order(events: list[Event]) -> Iterator[str]:
    last: dict[int, float] = {}
    for event in events:
        if event["ph"] != "M":
            if event["ts"] < last.get(event["pid"], 0.0):
                yield f"{event['name']} comes behind what is later"
            last[event["pid"]] = event["ts"]
