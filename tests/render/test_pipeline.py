"""Charts and traces of simulated pipelines."""

from __future__ import annotations

import json
from xml.etree import ElementTree as Xml

from graphopt.render.perfetto import trace_events
from graphopt.render.pipeline import pipeline_chart
from graphopt.schedules.generate import generate
from graphopt.simulate.pipeline import PipelineTrace, StageCost, Transfer, simulate_pipeline

SVG = "{http://www.w3.org/2000/svg}"


def _trace(kind: str) -> PipelineTrace:
    stages = [StageCost(1e-3, 1e-3, 1e-3, saved=5.0)] * 3
    return simulate_pipeline(generate(kind, 3, 4), stages, [Transfer(1e-4, 1e-4)] * 2)


def test_chart_has_a_box_per_action() -> None:
    trace = _trace("zero_bubble")
    root = Xml.fromstring(pipeline_chart(trace, "zero bubble, 3 stages"))
    tips = [t.text for r in root.iter(f"{SVG}rect") for t in r.iter(f"{SVG}title")]
    assert len(tips) == len(trace.spans) == 3 * 4 * 3 + 2 * 2 * 4
    assert "1I2: 1 ms" in tips
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert [w for w in words if w and w.startswith(("rank ", "link "))] == list(trace.lanes)
    for legend in ("forward", "gradient of the input", "gradients of parameters", "transfer"):
        assert legend in words
    assert "backward" not in words
    assert any(w and "idle" in w for w in words)


def test_boxes_lie_in_time() -> None:
    trace = _trace("1f1b")
    root = Xml.fromstring(pipeline_chart(trace, "1F1B"))
    boxes = [r for r in root.iter(f"{SVG}rect") if list(r)]
    ends = [float(r.get("x", "0")) + float(r.get("width", "0")) for r in boxes]
    assert max(ends) <= 1000 - 24 + 0.6
    assert min(float(r.get("x", "0")) for r in boxes) == 88.0


def test_trace_for_a_viewer_with_memory() -> None:
    trace = _trace("no_flush")
    memory = {f"memory of rank {r}": steps for r, steps in enumerate(trace.memory)}
    found = trace_events(trace, "no flush", memory)
    events = found["traceEvents"]
    assert isinstance(events, list)
    assert json.loads(json.dumps(found)) == found
    assert sum(e["ph"] == "X" for e in events) == len(trace.spans)
    counters = [e for e in events if e["ph"] == "C" and e["name"] == "memory of rank 0"]
    # Two stages are behind rank 0: it holds 2 * 2 + 1 micro-batches, or all four of them.
    assert max(e["args"]["value"] for e in counters) == 4 * 5.0
