"""Gathers a report from a captured graph and what passes made of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

import graphopt
from graphopt.analysis.cost import cost
from graphopt.analysis.formats import format_of
from graphopt.analysis.liveness import liveness
from graphopt.analysis.regions import Region, regions
from graphopt.analysis.summary import Summary, Totals, summary
from graphopt.graph import Graph, module_of, phase_of
from graphopt.pipeline.step import PassStep, parts_of
from graphopt.plan import Phase, PlanPart
from graphopt.plan.part import to_data
from graphopt.render.report.document import (
    Document,
    Factors,
    Half,
    Memory,
    Module,
    PassEntry,
    TimeLine,
)
from graphopt.render.report.stories import stories
from graphopt.render.report.timeline import Link, Seconds, memory_points, pipeline_line, step_line
from graphopt.render.units import count, duration, size

NO_FORMAT = "other"


@dataclass(frozen=True)
class Sources:
    """What a report is gathered from.

    Attributes:
        model: its name.
        passes: the pipeline in the spec language.
        captured: the graph before any pass.
        rewritten: the graph after them; may be the same.
        steps: what the passes did.
        seconds: predicted, of each operator of `rewritten`.
        assumed: what these rest on, by topic.
        link: where gradients are reduced; ``None`` for one rank.
    """

    model: str
    passes: str
    captured: Graph
    rewritten: Graph
    steps: tuple[PassStep, ...]
    seconds: Seconds
    assumed: tuple[tuple[str, str], ...]
    link: Link | None = None


def document(sources: Sources) -> Document:
    """The report."""
    graph, parts = sources.rewritten, parts_of(sources.steps)
    lines = [step_line(graph, sources.seconds, sources.assumed, sources.link)]
    lines += [pipeline_line(data) for data in _staged(parts)]
    memory = _memory(graph, sources.seconds)
    modules = _module(graph, graph.get(summary), graph.get(regions), sources.seconds)
    return Document(
        model=sources.model,
        passes=sources.passes,
        level=str(graph.level),
        versions={"graphopt": graphopt.__version__, "torch": str(torch.__version__)},
        figures=tuple(_figures(modules, memory, lines[0], len(graph))),
        modules=modules,
        steps=tuple(map(_step, sources.steps)),
        time_lines=tuple(lines),
        memory=memory,
        factors=next(_factored(parts), None),
        stories=tuple(stories(sources.captured, graph, sources.steps)),
    )


def _figures(
    modules: Module, memory: Memory, line: TimeLine, nodes: int
) -> Iterator[tuple[str, str]]:
    forward, backward = modules.forward, modules.backward
    yield "parameters", count(modules.parameters)
    yield "operators", f"{forward.ops} + {backward.ops}, {nodes} nodes"
    yield "FLOPs", f"{count(forward.flops)} + {count(backward.flops)}"
    yield "moved", size(forward.bytes + backward.bytes)
    yield "saved for backward", size(memory.saved)
    yield "peak", size(memory.peak)
    yield "predicted", f"{duration(forward.seconds)} + {duration(backward.seconds)}"
    exposed = line.step - forward.seconds - backward.seconds
    if len(line.lanes) > 1:
        yield "exposed messages", duration(max(exposed, 0.0))


# -- modules ---------------------------------------------------------------------------------------


def _module(graph: Graph, figures: Summary, region: Region, seconds: Seconds) -> Module:
    inside = [node for part in region.walk() for node in part.nodes]
    return Module(
        path=figures.path,
        kind=figures.kind,
        output=figures.output,
        parameters=figures.parameters,
        forward=_half(figures.forward, inside, Phase.FORWARD, seconds),
        backward=_half(figures.backward, inside, Phase.BACKWARD, seconds),
        saved=figures.saved,
        formats=_formats(graph, inside),
        children=tuple(
            _module(graph, below, part, seconds)
            for below, part in zip(figures.children, region.children, strict=True)
        ),
    )


def _half(total: Totals, nodes: Iterable[fx.Node], phase: Phase, seconds: Seconds) -> Half:
    spent = math.fsum(seconds.get(node, 0.0) for node in nodes if phase_of(node) is phase)
    return Half(total.ops, total.flops, total.bytes, spent)


def _formats(graph: Graph, nodes: Iterable[fx.Node]) -> dict[str, int]:
    """FLOPs by the narrowest floating-point format that an operator reads."""
    costs = graph.get(cost).by_node
    found: Counter[str] = Counter()
    for node in nodes:
        if costs[node].flops:
            found[_format(node)] += costs[node].flops
    return dict(found.most_common())


def _format(node: fx.Node) -> str:
    read = [format_of(source) for source in node.all_input_nodes]
    known = [name for name in (*read, format_of(node)) if name]
    return min(known, key=lambda name: getattr(torch, name).itemsize, default=NO_FORMAT)


def _memory(graph: Graph, seconds: Seconds) -> Memory:
    held = graph.get(liveness)
    at = held.peak_at
    where = "" if at is None else f"{at.name} {module_of(at)}".strip()
    points = tuple((when, int(value)) for when, value in memory_points(graph, seconds))
    return Memory(points, held.peak, where, held.saved_bytes)


# -- passes ----------------------------------------------------------------------------------------


def _step(step: PassStep) -> PassEntry:
    return PassEntry(
        spec=step.spec,
        skipped=step.skipped,
        numerics=str(step.numerics),
        nodes=(step.nodes_before, step.nodes_after),
        seconds=step.seconds,
        applied=tuple(asdict(site) for site in step.outcome.applied),
        declined=tuple(asdict(site) for site in step.outcome.declined),
    )


def _staged(parts: Sequence[PlanPart]) -> Iterator[Mapping[str, Any]]:
    for part in parts:
        data = to_data(part)
        if {"stages", "schedule", "cuts"} <= data.keys():
            yield data


def _factored(parts: Sequence[PlanPart]) -> Iterator[Factors]:
    for part in parts:
        data = to_data(part)
        if {"blocks", "damping"} <= data.keys():
            plain = {k: v for k, v in data.items() if not isinstance(v, (list, dict))}
            yield Factors(plain, tuple(map(_block, data["blocks"])))


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    sides = [block["left"], *([block["right"]] if block["right"] else [])]
    return {
        "weight": block["weight"],
        "bias": block["bias"],
        "kind": block["kind"],
        "rows": block["start"],
        "left": _side(block["left"]),
        "right": _side(block["right"]) if block["right"] else "",
        "inverted": sum(side["blocks"] * side["size"] ** 3 for side in sides),
    }


def _side(side: Mapping[str, Any]) -> str:
    times = f"{side['blocks']} x " if side["blocks"] > 1 else ""
    rank = f", rank {side['rank']}" if side["rank"] else ""
    return f"{times}{side['size']} x {side['size']}, {side['form']}{rank}"
