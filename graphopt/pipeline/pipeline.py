"""A tuple of passes whose order is checked when it is built, and whose promises when it runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from graphopt.errors import ArgumentError, GraphoptError, PipelineError, RankError
from graphopt.graph import Graph
from graphopt.passbase import Outcome, Pass, PassContext
from graphopt.pipeline.order import check_order
from graphopt.pipeline.spec import format_pass, format_spec, parse_spec
from graphopt.pipeline.step import PassStep
from graphopt.plan import Role, Signature
from graphopt.plan.plan import check_part
from graphopt.verify import verify as verify_graph

VerifyLevel = Literal["off", "structure", "full"]


class Observer(Protocol):
    """What is called after each pass, skipped ones included.

    An observer may also have a method ``before(index, pass_, graph)``, which is called before each
    pass that is not skipped.
    """

    def __call__(self, index: int, pass_: Pass, graph: Graph, step: PassStep) -> None:
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
        check_order(self.passes)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline that a spec names; the inverse of `str`."""
        return cls(parse_spec(text))

    def __str__(self) -> str:
        return format_spec(self.passes)

    @property
    def on_forward(self) -> tuple[Pass, ...]:
        """The passes that rewrite the forward graph; the order has them first."""
        return tuple(pass_ for pass_ in self.passes if pass_.on_forward)

    def run(
        self,
        graph: Graph,
        ctx: PassContext | None = None,
        verify: VerifyLevel = "structure",
        earlier: Sequence[PassStep] = (),
    ) -> tuple[PassStep, ...]:
        """Rewrite `graph` in place.

        The graph is verified once before the first pass and after each pass that changed it.

        Args:
            graph: the graph; after an error it may be half rewritten.
            ctx: what passes may know beside the graph.
            verify: ``"off"``, ``"structure"`` (the table of invariants), ``"full"`` (also every
                operator on fake tensors).
            earlier: what the first passes did to the forward graph that this one is derived from.

        Returns:
            One step per pass.

        Raises:
            InvariantError: the graph was illegal before the first pass.
            PipelineError: a pass failed or broke a promise; the cause is chained.
            GraphoptError: a pass raised one, or left an illegal graph; it keeps its type and names
                the pass.
        """
        if verify not in ("off", "structure", "full"):
            raise ArgumentError(
                f"verify={verify!r} is not a level",
                hint="use 'off', 'structure' or 'full'",
            )
        steps: list[PassStep] = []
        checking = _verified(graph, verify) if self.passes else 0.0
        for index, pass_ in enumerate(self.passes):
            if index < len(earlier):
                steps.append(earlier[index])
                continue
            if reason := _reason_to_skip(pass_, graph):
                size = len(graph)
                step = PassStep(
                    format_pass(pass_), pass_.numerics, Outcome(), 0.0, 0.0, size, size, reason
                )
            else:
                for observer in self.observers:
                    if before := getattr(observer, "before", None):
                        before(index, pass_, graph)
                own = replace(ctx or PassContext(), running=pass_.name)
                step = self._run_one(index, graph, own, verify, checking)
                checking = 0.0
            steps.append(step)
            for observer in self.observers:
                observer(index, pass_, graph, step)
        return tuple(steps)

    def _run_one(
        self, index: int, graph: Graph, ctx: PassContext, verify: VerifyLevel, checking: float
    ) -> PassStep:
        pass_ = self.passes[index]
        size, signature, before = len(graph), graph.signature, _Fingerprint(graph)
        started = time.perf_counter()
        try:
            if present := pass_.conflicts & graph.facts:
                raise PipelineError(f"it must not run on a graph that is {min(present)!r} already")
            if symbols := () if pass_.symbolic else signature.names(Role.SIZE):
                raise PipelineError(
                    f"it takes graphs of fixed sizes only, and {symbols[0]} is a symbol",
                    hint="capture without dynamic=, or write the size as a number in the text",
                )
            outcome = pass_.apply(graph, ctx)
            if not isinstance(outcome, Outcome):
                raise PipelineError(f"its apply returned {outcome!r}, not an Outcome")
            if outcome.changed:
                graph.changed()
            seconds = time.perf_counter() - started
            if graph.signature != signature:
                _check_signature(pass_, signature, graph.signature)
            if outcome.part is not None:
                check_part(outcome.part, pass_.name)
            if outcome.changed:
                checking += _verified(graph, verify)
            elif not before.holds(graph):
                raise PipelineError("it changed the graph, but its outcome has nothing applied")
        except RankError:
            raise  # it is about the ranks, whichever pass has asked them
        except Exception as error:
            raise self._failed(index, error) from error
        graph.facts |= pass_.provides
        return PassStep(
            format_pass(pass_), pass_.numerics, outcome, seconds, checking, size, len(graph)
        )

    def _failed(self, index: int, error: Exception) -> GraphoptError:
        """The error with the pass that raised it; one of graphopt's own keeps its type."""
        earlier = ", ".join(pass_.name for pass_ in self.passes[:index])
        after = f" (after {earlier})" if earlier else ""
        name = self.passes[index].name
        if not isinstance(error, GraphoptError):
            return PipelineError(f"pass {name!r}{after} failed: {type(error).__name__}: {error}")
        named = copy.copy(error)
        named.message = f"pass {name!r}{after} failed: {error.message}"
        named.args = (named.message,)
        return named


def _check_signature(pass_: Pass, before: Signature, after: Signature) -> None:
    """A pass declares that it changes the signature, and what it adds for itself has its name."""
    if not pass_.changes_signature:
        raise PipelineError("it changed the signature and does not declare that")
    known = {*before.inputs, *before.outputs}
    for slot in (*after.inputs, *after.outputs):
        owned = slot.role in (Role.STATE, Role.AUX) and slot not in known
        if owned and not slot.name.startswith(f"{pass_.name}/"):
            raise PipelineError(
                f"it added {slot}, which is not in its own namespace",
                hint=f"name it '{pass_.name}/{slot.name}'",
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
