"""`optimize`: the only place where capture, passes and runtime meet."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt import registry
from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.analysis.parameter_roles import find_roles
from graphopt.capture import Capture, capture
from graphopt.capture.forward import Rewriter
from graphopt.capture.kept import Store
from graphopt.capture.sizes import NONE, Dimensions
from graphopt.errors import ArgumentError, BackendMismatchError, MismatchError
from graphopt.graph import Graph, Level
from graphopt.model import features, remembered
from graphopt.model.arguments import (
    Example,
    Mesh,
    check_kept,
    check_model,
    check_step,
    made_optimizer,
    mesh_of,
    one_of,
    parse_mesh,
    pipeline_of,
    split_example_inputs,
)
from graphopt.model.backend_choice import Built, choose, timed
from graphopt.model.bands import PerBand, band_of
from graphopt.model.declared import Declared, Dim
from graphopt.model.entries import BackendChoice, Specialisation, Verification
from graphopt.model.forward_passes import ForwardPasses
from graphopt.model.parametrize import named_parameters
from graphopt.model.replacing import Replacement
from graphopt.model.report import Report
from graphopt.model.specialiser import Cache, Fallback, OnMismatch, Specialiser, Variant
from graphopt.model.surface import install, plain_forward, restore
from graphopt.model.trial import Call, Trial, describe_call
from graphopt.model.varying import readable
from graphopt.model.verification import Check, Stage, Stages
from graphopt.passbase import Pass, PassContext
from graphopt.pipeline import Pipeline
from graphopt.pipeline.step import parts_of
from graphopt.plan import Plan, PlanPart

if TYPE_CHECKING:
    from graphopt.model.controller import Controller
    from graphopt.runtime.owned_step import OwnedStep
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")

M = TypeVar("M", bound=nn.Module)
Verify = Literal["off", "structure", "eager", "full"]


def optimize(
    model: M,
    example_inputs: object = None,
    *,
    passes: str | Sequence[Pass] = "auto",
    mesh: object = None,
    backend: str = "auto",
    verify: Verify = "eager",
    fallback: Fallback | None = None,
    on_mismatch: OnMismatch = "raise",
    loss: Callable[[Any, Any], Any] | None = None,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    dynamic: bool | Mapping[str, Mapping[int, str | Dim]] | None = None,
    cache: Cache = "verified",
    dry_run: bool = False,
) -> M | Plan:
    """Optimize a model in place and return it.

    The model stays the same object of the same class with the same parameters, keys and signature,
    unless a pass replaces parameters, as ``low_rank`` does; only this instance's forward is another
    one. Each kind of call (shapes, dtypes, training mode,
    grad mode, autocast, …) is captured once, when it first happens, and guarded afterwards. Numbers
    and sizes that change from call to call become inputs of the graph where that can be.

    An error in a call is that call's: the model stays optimized, with its captures and the state of
    its passes, and a call that eager refuses too raises what eager raises.

    Args:
        model: any module that can be captured as one graph.
        example_inputs: capture now instead of at the first call: a tensor, a tuple of positional
            arguments, a dict of keyword arguments, or a pair of both. If that fails, the model is
            given back as it was, not optimized.
        passes: ``"auto"``, a spec such as ``"cleanup,fold_inference"``, or a list of passes.
        mesh: the parallel dimensions: a `torch.distributed.device_mesh.DeviceMesh` with names, a
            process group for ``dp``, or sizes as ``"dp=8"`` or ``{"dp": 8}``. In a running job the
            default is all its ranks as ``dp``.
        backend: ``"eager"``, ``"inductor"``, that of an installed package, or ``"auto"`` for the
            faster of eager and Inductor on the first real step.
        verify: ``"off"``; ``"structure"``: the invariants after every pass; ``"eager"``: also
            compare what will run, after all passes and in the chosen backend, with PyTorch eager,
            once per specialisation, on the first real batch: outputs, gradients and buffers;
            ``"full"``: also each pass on its own.
        fallback: what happens to a call that cannot be captured. ``"error"``: it raises;
            ``"eager"``: it runs as plain PyTorch, with one warning per kind of call; by default it
            raises, until the model has trained, so that a later validation does not end the run.
            In a job a training call raises all the same, as its gradients would not be reduced.
        on_mismatch: what happens where `verify` finds that the graph computes something else than
            eager. ``"raise"``: raise; ``"warn"``: warn once and run the graph; ``"eager"``: warn
            and run calls of this kind as plain PyTorch.
        loss: for passes that run whole steps, by ``model.step(*batch)``: of the model's output and
            the last item of the batch; by default the output is, or has, the loss.
        optimizer: for passes that run whole steps: of the model's parameters, or what makes one of
            them; by default a step leaves gradients in ``.grad`` for one of yours.
        dynamic: sizes of arguments that vary, by dimension: ``{"ids": {0: "batch", 1: "length"}}``,
            with `graphopt.Dim` in place of a name for limits. They are symbols of the first graph.
            By default, sizes become symbols when they have changed; ``False``: never, so that each
            size has a graph of its own.
        cache: what later processes find again in the user's cache folder. ``"verified"``: captures,
            and that `verify` found nothing wrong with what ran; ``"captures"``: captures only, and
            each process verifies; ``"off"``: nothing, and nothing is looked for.
        dry_run: return the `Plan` for `example_inputs` and leave the model alone.

    Returns:
        The same model; with ``dry_run`` the plan.

    Raises:
        CaptureError: the model cannot be captured as one graph.
        MismatchError: the graph computes something else than eager; names the pass or backend.
        SpecError: `passes` names something that does not exist.
        PipelineError: the passes are in an impossible order.
        ArgumentError: an argument cannot be used.
    """
    _set_up_logging()
    check_model(model)
    one_of("backend", backend, ("auto", *registry.names(registry.BACKENDS)))
    one_of("verify", verify, get_args(Verify))
    if fallback is not None:
        one_of("fallback", fallback, get_args(Fallback))
    one_of("on_mismatch", on_mismatch, get_args(OnMismatch))
    one_of("cache", cache, get_args(Cache))
    where = Mesh(parse_mesh(mesh), {}) if dry_run else mesh_of(mesh)
    session = _session(model, passes, where)
    sizes = where.sizes.values() if dry_run else [r.size for r in session.ranks.values()]
    pipeline = pipeline_of(passes, several_ranks=any(size > 1 for size in sizes))
    owns = [pass_ for pass_ in pipeline.passes if pass_.owns_step]
    check_step(model, loss, optimizer, pipeline, where)
    compiler = Compiler(
        pipeline,
        where.sizes,
        backend,
        verify,
        fallback=fallback,
        on_mismatch=on_mismatch,
        dynamic=Declared.of(dynamic, plain_forward(model)),
        cache=cache,
    )
    example = split_example_inputs(example_inputs)
    if dry_run:
        if example is None:
            raise ArgumentError(
                "dry_run needs example_inputs", hint="optimize(model, (batch,), dry_run=True)"
            )
        return compiler.plan(model, *example)
    wanting = [pass_.name for pass_ in pipeline.passes if pass_.wants_parameters(model)]
    if wanting and example is None:
        raise ArgumentError(
            f"pass {wanting[0]!r} replaces parameters, and an optimizer made before would "
            "miss them",
            hint="give example_inputs, so that it does so now: optimize(model, (batch,), …)",
        )
    for ranks in session.ranks.values():
        ranks.start(model)
    with _replacing(compiler, model, example, session) as replaced:
        made = made_optimizer(model, optimizer, replaced)
        controller = install(model, compiler, session)
        if owns:
            count = owns[0].micro_batches(where.sizes)
            session.owned = _owned(model, controller, session, loss, made, count)
        if example is not None:
            try:
                controller.specialise(model, *example)
            except BaseException:
                restore(model)
                raise
    return model


@contextmanager
def _replacing(
    compiler: Compiler, model: nn.Module, example: Example | None, session: Session
) -> Iterator[Mapping[str, Tensor]]:
    """Within, parameters are replaced; gives the old ones, and an error gives them back."""
    if example is None:
        yield {}
        return
    replacement = compiler.replace(model, *example, session)
    try:
        if replacement.made:
            for ranks in session.ranks.values():
                ranks.start(model)  # factors of rank 0 for all
        session.decided.update(replacement.decided)
        replacement.check(raises=compiler.on_mismatch == "raise")
        yield replacement.old
    except BaseException:
        replacement.undo()
        raise
    replacement.settle()


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
        chosen = choose(self._backend(session), make, trial, captured.graph, band)
        choice, built, others = chosen.choice, chosen.built, chosen.others
        verification = known.verification or Verification(self.verify, "not run")
        if compares:
            run = partial(self._run, captured, session)
            where = describe_call(model, args, kwargs)
            around = session.watched_trial if self.verify == "full" else session.trial
            trial = Trial(model, args, kwargs, around)
            state = session.states.tensor
            check = Check(self.verify, where, trial, forward, run, captured.inputs, state)
            try:
                try:
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
            signature=describe_call(model, args, kwargs),
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
        warnings.warn(f"the graph runs all the same (on_mismatch='warn'): {error}", stacklevel=2)
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


def _owned(
    model: nn.Module,
    controller: Controller,
    session: Session,
    loss: Callable[[Any, Any], Any] | None,
    optimizer: Optimizer | None,
    micro_batches: int,
) -> OwnedStep:
    from graphopt.runtime.owned_step import OwnedStep

    reference = weakref.ref(model)

    def found() -> nn.Module:
        model = reference()
        assert model is not None
        return model

    return OwnedStep(
        model=found,
        loss=loss,
        optimizer=optimizer,
        micro_batches=micro_batches,
        kind_of=lambda args, kwargs: controller.variant(found(), args, kwargs),
        untouched=lambda args, kwargs: Trial(found(), args, kwargs, session.trial).without_trace(),
    )


def _session(model: nn.Module, passes: str | Sequence[Pass], mesh: Mesh) -> Session:
    """What the model keeps, with the ranks of a running job that these passes make use of."""
    from graphopt.runtime.ranks.ranks import Ranks
    from graphopt.runtime.session import Session

    # A preset means the same methods on the model on one rank and on several.
    pipeline = pipeline_of(passes, several_ranks=True).passes
    ranks = {}
    for dimension, group in mesh.groups.items():
        users = [p for p in pipeline if dimension in p.communicates]
        if users and (group.size() > 1 or any(p.on_one_rank for p in users)):
            ranks[dimension] = Ranks.of(model, group)
    return Session([p.name for p in pipeline], ranks).announced(mesh.groups.values(), str(passes))


def _set_up_logging() -> None:
    level = os.environ.get("GRAPHOPT_LOG")
    if level and not log.handlers:
        logging.basicConfig()
        log.setLevel(level.upper())
