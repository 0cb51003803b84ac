"""The arguments of one `optimize`, and what follows from them for every graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphopt import registry
from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.capture import Capture
from graphopt.capture.garbage import keeping_garbage
from graphopt.graph import Graph
from graphopt.model import features
from graphopt.model.arguments import mesh_of
from graphopt.model.backend_choice import Built
from graphopt.model.levels import Verify
from graphopt.model.specialiser import Cache
from graphopt.model.verification import Stage
from graphopt.pipeline import Pipeline
from graphopt.plan import Plan, PlanPart

if TYPE_CHECKING:
    from graphopt.runtime.session import Session


@dataclass(frozen=True)
class Recipe:
    """How graphs are rewritten, built and compared.

    Attributes:
        pipeline: the passes.
        mesh: sizes of the parallel dimensions, by name.
        backend: what was asked for.
        verify: what is compared with eager, and how often.
        cache: what later processes find again.
    """

    pipeline: Pipeline
    mesh: Mapping[str, int]
    backend: str
    verify: Verify = field(default_factory=lambda: Verify("eager"))
    cache: Cache = "off"

    def notes(self, in_ddp: bool) -> tuple[str, ...]:
        """What the user should know before anything is captured; DDP may be around the model."""
        reduced = any(pass_.reduces for pass_ in self.pipeline.passes)
        groups = mesh_of(None).groups
        sizes = self.mesh or {name: group.size() for name, group in groups.items()}
        if reduced or not groups or sizes.get("dp", 1) == 1:
            return ()
        if in_ddp:
            return ("gradients are reduced by DistributedDataParallel, which is around the model",)
        return (
            "gradients are not reduced across ranks: no pass of this pipeline does it; leave out "
            "passes= for one that does, or wrap the optimized model in DistributedDataParallel",
        )

    def constant_sizes(self) -> str:
        """Why sizes cannot be inputs of graphs; empty if they can."""
        static = [pass_.name for pass_ in self.pipeline.passes if not pass_.symbolic]
        if static:
            return f"the pass {static[0]!r} takes graphs of fixed sizes only"
        for name in ("eager", "inductor") if self.backend == "auto" else (self.backend,):
            if not getattr(registry.get(name, registry.BACKENDS), "symbolic", False):
                return f"the backend {name!r} takes graphs of fixed sizes only"
        return ""

    def backend_for(self, session: Session) -> str:
        """What runs; ranks must not wait for a trial whose rounds they count differently."""
        if not session.ranks or self.backend != "auto":
            return self.backend
        devices = {ranks.device.type for ranks in session.ranks.values()}
        return "inductor" if "cuda" in devices else "eager"

    def plan_of(
        self, captured: Capture, graph: Graph, parts: tuple[PlanPart, ...], backend: str
    ) -> Plan:
        """What the runtime obeys."""
        return Plan(
            spec=str(self.pipeline),
            signature=graph.signature,
            backend=backend,
            gradient_sources=graph.get(gradient_sources),
            aliases=captured.aliases,
            facts=tuple(sorted(graph.facts)),
            parts=parts,
        )

    def build(
        self,
        captured: Capture,
        graph: Graph,
        parts: tuple[PlanPart, ...],
        session: Session,
        backend: str,
    ) -> Built:
        """A graph, built by a backend."""
        from graphopt.runtime.backends import build

        with keeping_garbage() if backend == "eager" else nullcontext():
            engine = build(graph.module, self.plan_of(captured, graph, parts, backend), session)
        return Built(engine, captured.bind(features.watched(engine, features.features_of(graph))))

    def run(self, session: Session, captured: Capture, stage: Stage) -> Callable[..., object]:
        """A stage of the graph, in the eager backend, as a call of the model."""
        return self.build(captured, stage.graph, stage.parts, session, "eager").call
