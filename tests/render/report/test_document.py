"""A report's data against the analyses that it is gathered from, counted in another way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from graphopt.analysis.cost import cost
from graphopt.analysis.gradient_order import measured_order, roofline
from graphopt.capture import capture
from graphopt.graph import Graph, phase_of
from graphopt.grouping.planner import plan
from graphopt.network.curve import Curve
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.plan import Phase, Role
from graphopt.render.report.document import Document, Module
from graphopt.render.report.gather import Sources, document
from graphopt.render.report.timeline import Link
from graphopt.render.report.trace import trace_of
from graphopt.testing import joint_graphs

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SLOW_LINK = Curve.affine(1e-6, 1e-6, "1 MB/s, assumed")


def gathered(
    graph: Graph, spec: str = "cleanup", mesh: Mapping[str, int] | None = None
) -> Document:
    rewritten = graph.copy()
    steps = Pipeline.parse(spec).run(rewritten, PassContext(mesh=mesh or {}))
    seconds = roofline(rewritten)
    return document(Sources("net", spec, graph, rewritten, steps, seconds, (("compute", "test"),)))


@pytest.fixture(scope="module")
def deep() -> Graph:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)]
    return capture(nn.Sequential(*layers, nn.Linear(16, 3)), (torch.randn(4, 16),)).graph


def leaves(module: Module) -> Iterator[Module]:
    yield module
    for child in module.children:
        yield from leaves(child)


@QUICK
@given(joint_graphs())
def test_every_generated_graph_has_a_report_whose_parts_add_up(graph: Graph) -> None:
    found = gathered(graph)
    rewritten = graph.copy()
    Pipeline.parse("cleanup").run(rewritten, PassContext())
    seconds = roofline(rewritten)
    for phase, half in (
        (Phase.FORWARD, found.modules.forward),
        (Phase.BACKWARD, found.modules.backward),
    ):
        mine = [node for node in rewritten.operators if phase_of(node) is phase]
        assert half.seconds == pytest.approx(math.fsum(seconds[node] for node in mine))
        assert half.flops == sum(rewritten.get(cost).by_node[node].flops for node in mine)
    (line,) = found.time_lines
    spans = sorted(line.activities, key=lambda one: one.start)
    assert math.fsum(one.end - one.start for one in spans) == pytest.approx(sum(seconds.values()))
    for before, after in pairwise(spans):
        assert after.start == pytest.approx(before.end)
    assert (
        sum(found.modules.formats.values())
        == found.modules.forward.flops + found.modules.backward.flops
    )
    roles = (Role.PARAM, Role.BUFFER)
    assert [s.name for s in found.stories] == [
        s.name for s in graph.signature.inputs if s.role in roles
    ]
    json.dumps(asdict(found), allow_nan=False)


@QUICK
@given(joint_graphs())
def test_memory_is_what_a_simple_walk_holds(graph: Graph) -> None:
    """Counted by identity of fake storages, without the analysis of aliases."""
    found = gathered(graph, "")
    peak = found.memory.peak
    assert max(size for _, size in found.memory.points) <= peak
    nodes = graph.nodes
    last: dict[int, int] = {}
    sizes: dict[int, int] = {}
    born: dict[int, int] = {}
    outside = {_key(value) for node in graph.inputs for value in _tensors(node.meta["val"])}
    for index, node in enumerate(nodes):
        for source in (*node.all_input_nodes, node):
            for value in _tensors(source.meta.get("val")):
                key = _key(value)
                if key not in outside and source.op != "placeholder":
                    born.setdefault(key, index)
                    sizes[key] = max(sizes.get(key, 0), value.untyped_storage().nbytes())
                    last[key] = index
    held = [sum(s for k, s in sizes.items() if born[k] <= i <= last[k]) for i in range(len(nodes))]
    assert peak <= max(held, default=0)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [v for v in value if isinstance(v, torch.Tensor)]
        if isinstance(value, (tuple, list))
        else []
    )


def _key(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def test_a_job_has_messages_that_start_when_their_gradients_are_ready(deep: Graph) -> None:
    graph = deep
    seconds = roofline(graph)
    order = measured_order(graph, seconds)
    grouping = plan(order.ready, SLOW_LINK, order.backward, world=4)
    sources = Sources("net", "", graph, graph, (), seconds, (), Link(4, SLOW_LINK, grouping))
    (line,) = document(sources).time_lines
    messages = [one for one in line.activities if one.kind == "message"]
    computed = max(one.end for one in line.activities if one.kind == "backward")
    forward = max(one.end for one in line.activities if one.kind == "forward")
    assert len(messages) == len(grouping.groups)
    assert messages[0].start == pytest.approx(forward + grouping.groups[0].ready)
    assert line.step - computed == pytest.approx(grouping.exposed)
    assert dict(document(sources).figures)["exposed messages"] != "0 ms"


def test_stages_are_a_time_line_of_their_own(deep: Graph) -> None:
    found = gathered(deep, "partition", {"pp": 2})
    stages = found.time_lines[1]
    assert stages.title == "2 stages"
    assert {"rank 0", "rank 1"} <= set(stages.lanes)
    kinds = {one.kind for one in stages.activities}
    assert {"forward", "backward", "transfer"} <= kinds
    assert set(stages.counters) == {"bytes of rank 0", "bytes of rank 1"}


def test_factors_formats_and_stories_tell_what_passes_did(deep: Graph) -> None:
    found = gathered(deep, "cleanup,kfac")
    assert found.factors is not None
    weights = {str(block["weight"]) for block in found.factors.blocks}
    assert weights
    for story in found.stories:
        verdicts = {(one["pass"], one["verdict"]) for one in story.decisions}
        if story.name in weights:
            assert ("kfac", "applied") in verdicts
            assert any(one["part"] == "kfac" for one in story.planned)
    lowered = gathered(deep, "cleanup,precision{policy=tf}")
    assert "bfloat16" in lowered.modules.formats
    # A gradient that the graph calls "view" is not meant by "removed view".
    for story in lowered.stories:
        told = [one["words"] for one in story.decisions if one["pass"] == "cleanup"]
        assert not [words for words in told if "removed view" in words]
    for module in leaves(lowered.modules):
        assert sum(module.formats.values()) == module.forward.flops + module.backward.flops


def test_the_trace_has_a_process_per_time_line_and_spans_that_do_not_overlap(deep: Graph) -> None:
    found = gathered(deep, "partition", {"pp": 2})
    events = trace_of(found)["traceEvents"]
    assert isinstance(events, list)
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {1, 2}
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in spans:
        assert event["dur"] >= 0
        assert event["ts"] >= 0
        by_thread.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
    for times in by_thread.values():
        times.sort()
        for (start, spent), (later, _) in pairwise(times):
            assert start + spent <= later + 1e-6
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert set(by_thread) <= threads
