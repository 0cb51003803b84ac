"""Makes one specialisation: the only place where capture, passes and runtime meet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from graphopt import registry
from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.analysis.parameter_roles import find_roles
from graphopt.capture import Capture, capture
from graphopt.capture.forward import Rewriter
from graphopt.capture.kept import Store
from graphopt.capture.sizes import NONE, Dimensions
from graphopt.errors import BackendMismatchError, MismatchError
from graphopt.graph import Graph, Level
from graphopt.model import features, remembered
from graphopt.model.arguments import (
    check_kept,
    mesh_of,
)
from graphopt.model.backend_choice import Built, choose, timed
from graphopt.model.bands import PerBand, band_of
from graphopt.model.entries import BackendChoice, Specialisation, Verification
from graphopt.model.forward_passes import ForwardPasses
from graphopt.model.parametrize import named_parameters
from graphopt.model.replacing import Replacement
from graphopt.model.report import Report
from graphopt.model.specialiser import Cache, Specialiser, Variant
from graphopt.model.surface import plain_forward
from graphopt.model.trial import Call, Trial, describe_call
from graphopt.model.varying import readable
from graphopt.model.verification import Check, Stage, Stages
from graphopt.notices import telling, warn
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.pipeline.step import parts_of
from graphopt.plan import Plan, PlanPart

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")

Verify = Literal["off", "structure", "eager", "full"]


@dataclass(frozen=True)
class Compiler(Specialiser):
    """The arguments of one `optimize`, and what it takes to make a specialisation."""

    pipeline: Pipeline
    mesh: Mapping[str, int]
    backend: str
    verify: Verify
    cache: Cache = "off"

    def report(self, model: str) -> Report:
        """An empty report for a model of this class name."""
        return Report(model=model, spec=str(self.pipeline), specialisations=(), notes=self._notes())

    def _notes(self) -> tuple[str, ...]:
        reduced = any(pass_.reduces for pass_ in self.pipeline.passes)
        groups = mesh_of(None).groups
        sizes = self.mesh or {name: group.size() for name, group in groups.items()}
        if reduced or not groups or sizes.get("dp", 1) == 1:
            return ()
        return (
            "gradients are not reduced across ranks: no pass of this pipeline does it; leave out "
            "passes= for one that does, or wrap the optimized model in DistributedDataParallel",
        )

    def plan(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Plan:
        """What would be done for one call; runs no step."""
        ctx = PassContext(mesh=self.mesh)
        forward = ForwardPasses(
            self.pipeline, replace(ctx, parameters=self._parameters(model)), "structure"
        )
        captured = capture(
            model, args, kwargs, forward=plain_forward(model), rewrite=forward.rewriter
        )
        steps = self.pipeline.run(captured.graph, ctx, "structure", forward.steps)
        backend = "eager" if self.backend == "auto" else self.backend
        return self._plan(captured, captured.graph, parts_of(steps), backend)

    def compile(
        self,
        model: nn.Module,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        session: Session,
        numbers: frozenset[str] = frozenset(),
        dimensions: Dimensions = NONE,
        *,
        remember: bool = True,
    ) -> Variant:
        """Capture, rewrite, check and build the variant for one call.

        With `remember`, what an earlier process has verified is not verified again.
        """
        level = "structure" if self.verify == "eager" else self.verify
        ctx = PassContext(session.ranks, self.mesh, session.states, decided=session.decided)
        early = ForwardPasses(self.pipeline, ctx, level)
        where = describe_call(model, args, kwargs)
        name = type(model).__name__
        with telling(f"capturing {name}", f"the first call with {where}"):
            captured = capture(
                model,
                args,
                kwargs,
                forward=forward,
                numbers=numbers,
                dimensions=dimensions,
                rewrite=early.rewriter,
                symbols=not self.constant_sizes(),
                store=Store() if self.cache != "off" else None,
            )
        if captured.keeps and captured.graph.level is Level.JOINT:
            sizes = {name: ranks.size for name, ranks in session.ranks.items()}
            check_kept(self.pipeline, sizes, captured.keeps[0], forward)
        # Passes change the graph in place.
        roles = find_roles(captured.graph) if captured.graph.level is Level.JOINT else {}
        trial = Trial(model, args, kwargs, session.trial)
        keys = remember and self.cache == "verified" and self.verify in ("eager", "full")
        known = remembered.known(
            remembered.key_of(captured.digest, self.pipeline, self.verify, self.backend)
            if keys
            else ""
        )
        compares = self.verify in ("eager", "full") and known.verification is None
        stages = early.stages(captured) if compares else Stages()
        pipeline = replace(self.pipeline, observers=(stages,)) if compares else self.pipeline
        checks = "off" if known.verification else level
        steps = pipeline.run(captured.graph, ctx, checks, early.steps)
        parts = parts_of(steps)
        make = partial(self._build, captured, captured.graph, parts, session)
        band = band_of(captured.sizes_of(model, *args, **kwargs)) if captured.symbolic else None
        requested = self._backend(session)
        measured = "the faster of eager and Inductor runs it"
        why = measured if requested == "auto" else f"backend {requested!r}"
        with telling(f"building {name}", f"{why}, once for each kind of call"):
            chosen = choose(requested, make, trial, captured.graph, band)
        choice, built, others = chosen.choice, chosen.built, chosen.others
        verification = known.verification or Verification(self.verify, "not run")
        if compares:
            run = partial(self._run, captured, session)
            around = session.watched_trial if self.verify == "full" else session.trial
            trial = Trial(model, args, kwargs, around)
            state = session.states.tensor
            check = Check(self.verify, where, trial, forward, run, captured.inputs, state)
            try:
                try:
                    with telling(f"comparing {name} with PyTorch eager", f"verify={self.verify!r}"):
                        verification = check(stages.stages, choice.backend, built.call)
                except BackendMismatchError as error:
                    if self.backend != "auto":
                        raise
                    log.warning("running eager instead: %s", error)
                    choice, built = BackendChoice("eager", "auto", error.message), make("eager")
                    others = {}
                    verification = check(stages.stages, choice.backend, built.call)
                others = self._right(others, check, stages)
            except MismatchError as error:
                verification, others = self._mismatched(error), {}
        plan = self._plan(captured, captured.graph, parts, choice.backend)
        ran = remembered.ran(captured.graph, plan) if known.key else ""
        if known.other(ran):
            return self.compile(model, forward, args, kwargs, session, remember=False)
        if compares:
            remembered.remember(known.key, verification, ran)
        session.agree(plan, captured.functions if model.training else "")
        call: Call = built.call
        if chosen.bands is not None and others and band is not None:
            calls = {n: b.call for n, b in others.items()} | {choice.backend: built.call}
            call = PerBand(chosen.bands, calls, captured.sizes_of, partial(timed, session), band)
        entry = Specialisation(
            signature=where,
            level=str(captured.graph.level),
            route=captured.route,
            capture_seconds=captured.seconds,
            steps=steps,
            backend=choice,
            verification=verification,
            plan=plan,
            notes=captured.notes + features.note(features.features_of(captured.graph)),
            sizes=captured.sizes,
            numbers=tuple(sorted(map(readable, captured.numbers))),
            unkept=captured.unkept,
        )
        captured.finish()
        return Variant(
            call,
            built.engine,
            captured.holds,
            captured.failure,
            entry,
            roles,
            numbers=captured.numbers,
            changed=captured.changed,
        )

    def _right(
        self, others: Mapping[str, Built], check: Check, stages: Stages
    ) -> Mapping[str, Built]:
        """Those of the backends that other sizes may run in whose results are eager's, too."""
        right = {}
        for name, other in others.items():
            try:
                check(stages.stages, name, other.call)
                right[name] = other
            except BackendMismatchError as error:
                log.warning("%s is not used at any size: %s", name, error)
        return right

    def constant_sizes(self) -> str:
        """See `Specialiser.constant_sizes`."""
        static = [pass_.name for pass_ in self.pipeline.passes if not pass_.symbolic]
        if static:
            return f"the pass {static[0]!r} takes graphs of fixed sizes only"
        for name in ("eager", "inductor") if self.backend == "auto" else (self.backend,):
            if not getattr(registry.get(name, registry.BACKENDS), "symbolic", False):
                return f"the backend {name!r} takes graphs of fixed sizes only"
        return ""

    def replace(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], session: Session
    ) -> Replacement:
        """Replace the parameters that passes want replaced; an error leaves the model as it was."""
        made = Replacement(model, args, kwargs, plain_forward(model), session.trial)
        if self._parameters(model):
            ctx = PassContext(session.ranks, self.mesh, session.states)
            made.make(self.pipeline, ctx, compares=self.verify in ("eager", "full"))
        return made

    def rewriter(self) -> Rewriter | None:
        """What the passes do with the forward graph once parameters are replaced."""
        return ForwardPasses(self.pipeline, PassContext(mesh=self.mesh), "off").rewriter

    def _parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Those of the model, where a pass may replace some of them."""
        wanted = any(pass_.wants_parameters(model) for pass_ in self.pipeline.passes)
        return named_parameters(model) if wanted else {}

    def _mismatched(self, error: MismatchError) -> Verification:
        """What is reported where the user lets a graph run that differs from eager."""
        if self.on_mismatch != "warn":
            raise error
        warn(f"the graph runs all the same (on_mismatch='warn'): {error}")
        return Verification(self.verify, "mismatch")

    def _backend(self, session: Session) -> str:
        """Ranks must not wait for a trial whose rounds they count differently."""
        if not session.ranks or self.backend != "auto":
            return self.backend
        devices = {ranks.device.type for ranks in session.ranks.values()}
        return "inductor" if "cuda" in devices else "eager"

    def _run(self, captured: Capture, session: Session, stage: Stage) -> Callable[..., object]:
        """A stage of the graph, in the eager backend, as a call of the model."""
        return self._build(captured, stage.graph, stage.parts, session, "eager").call

    def _build(
        self,
        captured: Capture,
        graph: Graph,
        parts: tuple[PlanPart, ...],
        session: Session,
        backend: str,
    ) -> Built:
        from graphopt.runtime.backends import build

        engine = build(graph.module, self._plan(captured, graph, parts, backend), session)
        return Built(engine, captured.bind(features.watched(engine, features.features_of(graph))))

    def _plan(
        self, captured: Capture, graph: Graph, parts: tuple[PlanPart, ...], backend: str
    ) -> Plan:
        return Plan(
            spec=str(self.pipeline),
            signature=graph.signature,
            backend=backend,
            gradient_sources=graph.get(gradient_sources),
            aliases=captured.aliases,
            facts=tuple(sorted(graph.facts)),
            parts=parts,
        )
