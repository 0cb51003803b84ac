"""Makes one specialisation: the only place where capture, passes and runtime meet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graphopt import registry
from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.analysis.parameter_roles import find_roles
from graphopt.capture import Capture, capture
from graphopt.capture.forward import Rewriter
from graphopt.capture.kept import Store
from graphopt.capture.sizes import NONE, Dimensions
from graphopt.errors import BackendMismatchError, InvariantError, MismatchError
from graphopt.graph import Graph, Level
from graphopt.model import features, remembered
from graphopt.model.arguments import (
    check_kept,
    mesh_of,
)
from graphopt.model.backend_choice import Built, choose, timed
from graphopt.model.bands import PerBand, band_of
from graphopt.model.comparing import Args, Comparing, Kwargs
from graphopt.model.entries import BackendChoice, Specialisation, Verification
from graphopt.model.falling_back import sentence, without, words
from graphopt.model.forward_passes import ForwardPasses
from graphopt.model.kept_steps import KeptStep, Steps, told_of
from graphopt.model.levels import Verify
from graphopt.model.parametrize import named_parameters
from graphopt.model.replacing import Replacement
from graphopt.model.report import Report
from graphopt.model.sampling import Renewed, Sampled, of_all, plainly
from graphopt.model.specialiser import Cache, Specialiser, Variant
from graphopt.model.surface import plain_forward
from graphopt.model.trial import Call, Trial, describe_call
from graphopt.model.varying import readable
from graphopt.model.verification import Check, Stage, Stages
from graphopt.notices import telling
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.pipeline.step import parts_of
from graphopt.plan import Plan, PlanPart

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")


@dataclass(frozen=True)
class Compiler(Specialiser):
    """The arguments of one `optimize`, and what it takes to make a specialisation."""

    pipeline: Pipeline
    mesh: Mapping[str, int]
    backend: str
    verify: Verify = field(default_factory=lambda: Verify("eager"))
    cache: Cache = "off"

    def report(self, model: str, *, in_ddp: bool = False) -> Report:
        """An empty report for a model of this class name."""
        notes = self._notes(in_ddp)
        return Report(model=model, spec=str(self.pipeline), specialisations=(), notes=notes)

    def _notes(self, in_ddp: bool) -> tuple[str, ...]:
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

        With `remember`, what an earlier process has verified is not verified again. What is found
        wrong runs no more, where the user allows that (`on_mismatch`), in this variant and in all
        that follow.
        """
        trusted = self._trusted(model, session)
        kinds = (model, forward, args, kwargs, session, numbers, dimensions)
        try:
            variant = trusted._compile(*kinds, remember=remember)
        except MismatchError as error:
            if not trusted._distrust(error, model, session):
                raise
            variant = self.compile(*kinds, remember=False)
            said = sentence(error.guilty, error)
            return replace(variant, warnings=(said, *variant.warnings))
        if not session.distrusted:
            return variant
        fallen_back = tuple(f"{words(g)}: {why}" for g, why in session.distrusted.items())
        return replace(variant, entry=replace(variant.entry, fallen_back=fallen_back))

    def _compile(
        self,
        model: nn.Module,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        session: Session,
        numbers: frozenset[str],
        dimensions: Dimensions,
        *,
        remember: bool,
    ) -> Variant:
        verify = self.verify
        level = "structure" if verify.level == "eager" else verify.level
        ctx = PassContext(session.ranks, self.mesh, session.states, decided=session.decided)
        early = ForwardPasses(self.pipeline, ctx, level)
        kept = (
            Steps.of(self.pipeline, self.mesh, self.backend, verify.level, session)
            if remember and self.cache == "verified" and not verify.every
            else None
        )
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
                behind=kept.found if kept else lambda _: None,
            )
        if isinstance(captured.behind, KeptStep):
            return self._again(captured, captured.behind, model, args, kwargs, session)
        if captured.keeps and captured.graph.level is Level.JOINT:
            sizes = {name: ranks.size for name, ranks in session.ranks.items()}
            check_kept(self.pipeline, sizes, captured.keeps[0], forward)
        # Passes change the graph in place.
        roles = find_roles(captured.graph) if captured.graph.level is Level.JOINT else {}
        trial = Trial(model, args, kwargs, session.trial)
        keys = remember and self.cache == "verified" and verify.compares
        known = remembered.known(
            remembered.key_of(
                captured.digest, self.pipeline, verify.level, self.backend, _place(session)
            )
            if keys
            else ""
        )
        compares = verify.compares and known.verification is None
        # Where sizes vary, what runs at others is compared when it first does.
        observes = compares or verify.every > 0 or (verify.compares and captured.symbolic)
        stages = early.stages(captured) if observes else Stages()
        pipeline = replace(self.pipeline, observers=(stages,)) if observes else self.pipeline
        checks = "off" if known.verification else level
        # Ranks make their first training graph at the same time, and later ones on their own.
        first = captured.graph.level is Level.JOINT and model.training and verify.compares
        try:
            steps = pipeline.run(captured.graph, ctx, checks, early.steps)
        except InvariantError as error:
            if first:
                self._of_all(session, MismatchError(error.message, hint=error.hint))
            raise
        parts = parts_of(steps)
        make = partial(self._build, captured, captured.graph, parts, session)
        band = band_of(captured.sizes_of(model, *args, **kwargs)) if captured.symbolic else None
        requested = self._backend(session)
        measured = "the faster of eager and Inductor runs it"
        why = measured if requested == "auto" else f"backend {requested!r}"
        with telling(f"building {name}", f"{why}, once for each kind of call"):
            chosen = choose(requested, make, trial, captured.graph, band)
        choice, built, others = chosen.choice, chosen.built, chosen.others
        verification = known.verification or Verification(str(verify), "not run")
        run = partial(self._run, session)
        comparing = Comparing(captured, stages, session, forward, verify, run)
        said: tuple[str, ...] = ()
        wrong: MismatchError | None = None
        if compares:
            check = comparing.first(model, args, kwargs)
            try:
                try:
                    with telling(f"comparing {name} with PyTorch eager", f"verify='{self.verify}'"):
                        verification = check(stages.stages, choice.backend, built.call)
                except BackendMismatchError as error:
                    if self.backend != "auto" or session.ranks:
                        raise
                    choice, built = BackendChoice("eager", "auto", error.message), make("eager")
                    others = {}
                    said = (f"backend 'eager' runs, which backend='auto' leaves: {error}",)
                    verification = check(stages.stages, choice.backend, built.call)
                others, left = self._right(others, check, stages)
                said = (*said, *left)
            except MismatchError as error:
                wrong = error
        if first:
            self._of_all(session, wrong)
        if wrong is not None:
            raise wrong
        plan = self._plan(captured, captured.graph, parts, choice.backend)
        ran = remembered.ran(captured.graph, plan) if known.key else ""
        if known.other(ran):
            kinds = (model, forward, args, kwargs, session, numbers, dimensions)
            return self._compile(*kinds, remember=False)
        if compares:
            remembered.remember(known.key, verification, ran)
        session.agree(plan, captured.functions if model.training else "")
        call: Call = built.call
        if chosen.bands is not None and others and band is not None:
            calls = {n: b.call for n, b in others.items()} | {choice.backend: built.call}
            later = comparing.forgetful().later if observes else None
            measure = partial(timed, session)
            call = PerBand(chosen.bands, calls, captured.sizes_of, measure, band, later)
        if verify.every:
            settings = (numbers, dimensions)
            trains = captured.graph.level is Level.JOINT and model.training
            call = self._sampled(
                call, choice.backend, comparing.forgetful(), *settings, trains=trains
            )
        found, told = features.features_of(captured.graph), told_of(built.engine)
        if kept and captured.digest and chosen.bands is None and (ran or not compares):
            form = str(captured.graph.level)
            behind = KeptStep(form, plan, built.engine, steps, choice, verification, found, roles)
            kept.keep(captured.digest, captured.graph, behind, told, ran)
        entry = Specialisation(
            signature=where,
            level=str(captured.graph.level),
            route=captured.route,
            capture_seconds=captured.seconds,
            steps=steps,
            backend=choice,
            verification=verification,
            plan=plan,
            notes=captured.notes + features.note(found),
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
            warnings=said,
        )

    def _again(
        self,
        captured: Capture,
        step: KeptStep,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        session: Session,
    ) -> Variant:
        """The variant of a step that an earlier process has made."""
        session.agree(step.plan, captured.functions if model.training else "")
        entry = Specialisation(
            signature=describe_call(model, args, kwargs),
            level=step.level,
            route=captured.route,
            capture_seconds=captured.seconds,
            steps=step.steps,
            backend=step.backend,
            verification=step.verification,
            plan=step.plan,
            notes=captured.notes + features.note(step.features),
        )
        return Variant(
            captured.bind(features.watched(step.engine, step.features)),
            step.engine,
            captured.holds,
            captured.failure,
            entry,
            step.roles,
            changed=captured.changed,
        )

    # -- comparing with eager ----------------------------------------------------------------------

    def _of_all(self, session: Session, mine: MismatchError | None) -> None:
        """Raise on all ranks what one of them has found; once per graph that all have.

        Raises:
            MismatchError: some rank has found it.
            RankError: a rank does not come.
        """
        topic = f"comparison {len(session.distrusted)}"
        if not session.ranks or session.content(topic):
            return
        wrong = of_all(session, topic, mine)
        if wrong is not None:
            raise wrong
        session.content(topic, now=True)

    def _trusted(self, model: nn.Module, session: Session) -> Compiler:
        """Without what was found wrong."""
        found: Compiler = self
        for guilty in session.distrusted:
            left = without(guilty, found.pipeline, found.backend, model, job=_is_job(session))
            if left is not None:
                found = replace(found, pipeline=left[0], backend=left[1])
        return found

    def _distrust(self, error: MismatchError, model: nn.Module, session: Session) -> bool:
        """Whether something may run in place of what is wrong; all ranks say the same."""
        backend = "inductor" if self.backend == "auto" else self.backend
        left = without(error.guilty, self.pipeline, backend, model, job=_is_job(session))
        # What `auto` has chosen is given up without being told.
        automatic = self.backend == "auto" and error.guilty.startswith("backend")
        if left is None or not (self.on_mismatch == "warn" or automatic):
            return False
        session.distrusted[error.guilty] = error.message
        return True

    def _sampled(
        self,
        call: Call,
        backend: str,
        comparing: Comparing,
        numbers: frozenset[str],
        dimensions: Dimensions,
        *,
        trains: bool,
    ) -> Sampled:
        """A call that is compared with eager every so many steps."""
        session, forward = comparing.session, comparing.forward

        def compare(model: nn.Module, args: Args, kwargs: Kwargs) -> Verification:
            name, now = backend, call
            if isinstance(call, PerBand):
                name, now = call.chosen(model, *args, **kwargs)
            return comparing.later(model, args, kwargs, name, now)

        def renew(
            error: MismatchError | None, model: nn.Module, args: Args, kwargs: Kwargs
        ) -> Renewed:
            # One rank cannot have other passes than the others.
            job = _is_job(session)
            trusted = self._trusted(model, session)
            goes_on = error is None or not job or trains
            if error is not None and not (goes_on and trusted._distrust(error, model, session)):
                if self.on_mismatch == "raise" or (job and trains):
                    raise error
                return plainly(session, forward, error, self.on_mismatch)
            settings = (session, numbers, dimensions)
            variant = self.compile(model, forward, args, kwargs, *settings, remember=False)
            said = () if error is None else (sentence(error.guilty, error),)
            return Renewed(variant.call, (*said, *variant.warnings), variant)

        return Sampled(call, compare, renew, session, self.verify.every, trains)

    def _right(
        self, others: Mapping[str, Built], check: Check, stages: Stages
    ) -> tuple[Mapping[str, Built], tuple[str, ...]]:
        """Those of the backends that other sizes may run in whose results are eager's, too."""
        right, said = {}, []
        for name, other in others.items():
            try:
                check(stages.stages, name, other.call)
                right[name] = other
            except BackendMismatchError as error:
                said.append(f"backend {name!r} is used at no size: {error}")
        return right, tuple(said)

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
            made.make(self.pipeline, ctx, compares=self.verify.compares)
        return made

    def rewriter(self) -> Rewriter | None:
        """What the passes do with the forward graph once parameters are replaced."""
        return ForwardPasses(self.pipeline, PassContext(mesh=self.mesh), "off").rewriter

    def _parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Those of the model, where a pass may replace some of them."""
        wanted = any(pass_.wants_parameters(model) for pass_ in self.pipeline.passes)
        return named_parameters(model) if wanted else {}

    def _backend(self, session: Session) -> str:
        """Ranks must not wait for a trial whose rounds they count differently."""
        if not session.ranks or self.backend != "auto":
            return self.backend
        devices = {ranks.device.type for ranks in session.ranks.values()}
        return "inductor" if "cuda" in devices else "eager"

    def _run(self, session: Session, captured: Capture, stage: Stage) -> Callable[..., object]:
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


def _is_job(session: Session) -> bool:
    return any(ranks.size > 1 for ranks in session.ranks.values())


def _place(session: Session) -> str:
    """Which rank this is: each compares on its own batch, whatever others have found."""
    places = ((n, r.group.rank(), r.size) for n, r in sorted(session.ranks.items()))
    return " ".join(f"{name}:{rank}/{size}" for name, rank, size in places)
