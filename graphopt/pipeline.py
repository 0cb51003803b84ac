"""A tuple of passes whose order is checked when it is built, and whose promises when it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from graphopt import registry
from graphopt.errors import ArgumentError, GraphoptError, PipelineError, PluginError
from graphopt.graph import Graph
from graphopt.passbase import Outcome, Pass, PassContext
from graphopt.report import Step
from graphopt.spec import format_pass, format_spec, parse_spec
from graphopt.verify import verify as verify_graph

VerifyLevel = Literal["off", "structure", "full"]

# What capture provides.
CAPTURED = frozenset({"captured"})


class Observer(Protocol):
    """What is called after each pass, skipped ones included.

    An observer may also have a method ``before(index, pass_, graph)``, which is called before each
    pass that is not skipped.
    """

    def __call__(self, index: int, pass_: Pass, graph: Graph, step: Step) -> None:
        """Look at the graph after the pass with this position; must not change it."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in an order that their declared facts allow.

    Args:
        passes: the passes, in the order in which they run.
        observers: what is called around each pass; not part of equality.

    Raises:
        PipelineError: a pass needs a fact that no earlier pass provides, or conflicts with one
            that an earlier pass provides; names both passes and an order that works.
        SpecError: an option has a value that the spec language cannot say.
    """

    passes: tuple[Pass, ...]
    observers: tuple[Observer, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        format_spec(self.passes)
        facts = CAPTURED
        for index, pass_ in enumerate(self.passes):
            if missing := pass_.requires - facts:
                raise _needs(self.passes, index, min(missing))
            if present := pass_.conflicts & facts:
                raise _conflicts(self.passes, index, min(present))
            facts |= pass_.provides

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline that a spec names; the inverse of `str`."""
        return cls(parse_spec(text))

    def __str__(self) -> str:
        return format_spec(self.passes)

    def run(
        self, graph: Graph, ctx: PassContext | None = None, verify: VerifyLevel = "structure"
    ) -> tuple[Step, ...]:
        """Rewrite `graph` in place.

        The graph is verified once before the first pass and after each pass that changed it.

        Args:
            graph: the graph; after an error it may be half rewritten.
            ctx: what passes may know beside the graph.
            verify: ``"off"``, ``"structure"`` (the table of invariants), ``"full"`` (also every
                operator on fake tensors).

        Returns:
            One step per pass.

        Raises:
            InvariantError: the graph was illegal before the first pass.
            PipelineError: a pass failed, left an illegal graph or broke a promise; the cause is
                chained.
        """
        if verify not in ("off", "structure", "full"):
            raise ArgumentError(
                f"verify={verify!r} is not a level",
                hint="use 'off', 'structure' or 'full'",
            )
        steps: list[Step] = []
        checking = _verified(graph, verify) if self.passes else 0.0
        for index, pass_ in enumerate(self.passes):
            if reason := _reason_to_skip(pass_, graph):
                size = len(graph)
                step = Step(
                    format_pass(pass_), pass_.numerics, Outcome(), 0.0, 0.0, size, size, reason
                )
            else:
                for observer in self.observers:
                    if before := getattr(observer, "before", None):
                        before(index, pass_, graph)
                step = self._run_one(index, graph, ctx or PassContext(), verify, checking)
                checking = 0.0
            steps.append(step)
            for observer in self.observers:
                observer(index, pass_, graph, step)
        return tuple(steps)

    def _run_one(
        self, index: int, graph: Graph, ctx: PassContext, verify: VerifyLevel, checking: float
    ) -> Step:
        pass_ = self.passes[index]
        size, signature, before = len(graph), graph.signature, _Fingerprint(graph)
        started = time.perf_counter()
        try:
            if present := pass_.conflicts & graph.facts:
                raise PipelineError(f"it must not run on a graph that is {min(present)!r} already")
            outcome = pass_.apply(graph, ctx)
            if not isinstance(outcome, Outcome):
                raise PipelineError(f"its apply returned {outcome!r}, not an Outcome")
            if outcome.changed:
                graph.changed()
            seconds = time.perf_counter() - started
            if graph.signature != signature and not pass_.changes_signature:
                raise PipelineError("it changed the signature and does not declare that")
            if outcome.changed:
                checking += _verified(graph, verify)
            elif not before.holds(graph):
                raise PipelineError("it changed the graph, but its outcome has nothing applied")
        except Exception as error:
            raise self._failed(index, error) from error
        graph.facts |= pass_.provides
        return Step(
            format_pass(pass_), pass_.numerics, outcome, seconds, checking, size, len(graph)
        )

    def _failed(self, index: int, error: Exception) -> PipelineError:
        earlier = ", ".join(pass_.name for pass_ in self.passes[:index])
        after = f" (after {earlier})" if earlier else ""
        name = self.passes[index].name
        if not isinstance(error, GraphoptError):
            return PipelineError(f"pass {name!r}{after} failed: {type(error).__name__}: {error}")
        code = "" if isinstance(error, PipelineError) else f"[{error.code}] "
        return PipelineError(
            f"pass {name!r}{after} failed: {code}{error.message}",
            where=error.where,
            hint=error.hint,
        )


class _Fingerprint:
    """What passes rewrite, to tell whether they did; costs one tuple per node."""

    def __init__(self, graph: Graph) -> None:
        self._signature = graph.signature
        self._nodes = [(n, n.op, n.target, n.args, n.kwargs) for n in graph.nodes]
        self._meta = [(n.meta.get("val"), n.meta.get("partitioner_tag")) for n in graph.nodes]

    def holds(self, graph: Graph) -> bool:
        """Whether the graph is still the same; recorded values are compared by identity."""
        now = _Fingerprint(graph)
        return (
            self._signature == now._signature
            and self._nodes == now._nodes
            and all(
                value is new_value and tag == new_tag
                for (value, tag), (new_value, new_tag) in zip(self._meta, now._meta, strict=True)
            )
        )


def _verified(graph: Graph, level: VerifyLevel) -> float:
    """Verify, and return how many seconds it took."""
    started = time.perf_counter()
    if level != "off":
        verify_graph(graph, full=level == "full")
    return time.perf_counter() - started


def _reason_to_skip(pass_: Pass, graph: Graph) -> str:
    if not pass_.works_on(graph.level):
        levels = " and ".join(sorted(pass_.levels))
        return f"it works on {levels} graphs and this is a graph of level {graph.level}"
    # Facts were checked when the pipeline was built, so their provider was skipped.
    if missing := pass_.requires - graph.facts:
        return f"it needs {min(missing)!r}, whose provider was skipped"
    return ""


def _needs(passes: Sequence[Pass], index: int, fact: str) -> PipelineError:
    name = passes[index].name
    later = next((p.name for p in passes[index + 1 :] if fact in p.provides), None)
    if later is not None:
        return PipelineError(
            f"pass {name!r} needs {fact!r}, which {later!r} provides only after it",
            hint=_order_that_works(passes),
        )
    providers = _providers(fact)
    if not providers:
        return PipelineError(f"pass {name!r} needs {fact!r}, which no pass provides")
    which = " or ".join(map(repr, providers))
    return PipelineError(
        f"pass {name!r} needs {fact!r}, which {which} provides, but that is not in the pipeline",
        hint=f"put {which} before it: {providers[0]},{format_spec(passes)}",
    )


def _conflicts(passes: Sequence[Pass], index: int, fact: str) -> PipelineError:
    earlier = next((p.name for p in passes[:index] if fact in p.provides), "capture")
    return PipelineError(
        f"pass {passes[index].name!r} must run before {earlier!r}, "
        f"because the graph must not be {fact!r} yet when it runs",
        hint=_order_that_works(passes),
    )


def _providers(fact: str) -> list[str]:
    """All known passes that provide a fact."""
    found = []
    for name in registry.names():
        try:
            provides = registry.get(name).provides
        except PluginError:
            continue  # A broken plugin cannot help here; asking for it by name says what is wrong.
        if fact in provides:
            found.append(name)
    return found


def _order_that_works(passes: Sequence[Pass]) -> str:
    """The spec in an order that is as near to the given one as facts allow."""
    waiting, order, facts = list(passes), list[Pass](), CAPTURED
    while waiting:
        able = (p for p in waiting if _may_run(p, [q for q in waiting if q is not p], facts))
        chosen = next(able, None)
        if chosen is None:
            return "leave one of them out, no order of these passes works"
        waiting.remove(chosen)
        order.append(chosen)
        facts |= chosen.provides
    return f"this order works: {format_spec(order)}"


def _may_run(pass_: Pass, others: Sequence[Pass], facts: frozenset[str]) -> bool:
    return (
        pass_.requires <= facts
        and not pass_.conflicts & facts
        and not any(other.conflicts & pass_.provides for other in others)
    )
