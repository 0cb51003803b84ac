"""The story of every parameter and buffer: where it is used, and what was decided about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.formats import format_of
from graphopt.analysis.provenance import Neighbour, Provenance, names, provenance
from graphopt.graph import Graph, value_of
from graphopt.passbase import Number
from graphopt.pipeline.decisions import Decisions
from graphopt.pipeline.step import PassStep, parts_of
from graphopt.plan import Role
from graphopt.plan.reading import mentions
from graphopt.render.report.document import Story
from graphopt.render.units import size

USERS_TOLD = 6
ROLES = (Role.PARAM, Role.BUFFER)


def stories(captured: Graph, rewritten: Graph, steps: Sequence[PassStep]) -> Iterator[Story]:
    """One story for each parameter and buffer of the captured graph, in its order."""
    decisions, parts = Decisions(steps), parts_of(steps)
    left = names(rewritten)
    for slot, node in zip(captured.signature.inputs, captured.inputs, strict=True):
        if slot.role not in ROLES:
            continue
        told = provenance(captured, slot.name)
        facts = [*_facts(told), ("size", size(tensor_bytes(value_of(node))))]
        now = format_of(left.get(slot.name))
        if now != format_of(node):
            facts.append(("format", f"{format_of(node)}, and {now or 'replaced'} after the passes"))
        removed = slot.name not in left
        yield Story(
            name=slot.name,
            role=str(slot.role),
            type=told.type,
            module=f"{told.module} {told.kind}".strip(),
            facts=tuple(facts),
            decisions=tuple(_decisions(decisions.about(told, removed=removed))),
            planned=tuple(
                {"part": one.part, "path": one.path, "words": numbers(one.values)}
                for one in mentions(parts, slot.name)
            ),
        )


def numbers(values: Mapping[str, Number]) -> str:
    """``key value, key value``."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


def _facts(told: Provenance) -> Iterator[tuple[str, str]]:
    if told.source:
        yield "source", told.source.removeprefix(f"{Path.cwd()}/")
    for half in ("forward", "backward"):
        users = [other for other in told.users if other.phase == half]
        yield from ((f"used in {half}", _words(other)) for other in users[:USERS_TOLD])
        if len(users) > USERS_TOLD:
            yield f"used in {half}", f"and by {len(users) - USERS_TOLD} more"
    if told.gradient:
        g = told.gradient
        yield "gradient", f"{g.node}, from {g.operator}"
        yield "ready", f"operator {g.position} of {g.of} in backward; needs {g.needs} of them"
    yield from (("returned as", output) for output in told.outputs)


def _words(other: Neighbour) -> str:
    return f"{other.node}, {other.operator}"


def _decisions(steps: Sequence[PassStep]) -> Iterator[dict[str, str]]:
    for step in steps:
        if step.skipped:
            continue
        for applied in step.outcome.applied:
            yield _decision(step, "applied", applied.site, applied.what, applied.numbers)
        for declined in step.outcome.declined:
            words = f"{declined.reason}: {declined.detail}"
            yield _decision(step, "declined", declined.site, words, declined.numbers)


def _decision(
    step: PassStep, verdict: str, site: str, what: str, values: Mapping[str, Number]
) -> dict[str, str]:
    told = f" ({numbers(values)})" if values else ""
    return {"pass": step.spec, "verdict": verdict, "words": f"{site}: {what}{told}"}
