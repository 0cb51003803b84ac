"""Makes one variant: capture, passes, backend, comparison with eager, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.analysis.parameter_roles import find_roles
from graphopt.capture import Capture, capture
from graphopt.capture.garbage import keeping_garbage
from graphopt.capture.kept import Store
from graphopt.compiler.recipe import Recipe
from graphopt.errors import BackendMismatchError, InvariantError, MismatchError
from graphopt.graph import Level
from graphopt.model import features, remembered
from graphopt.model.arguments import check_kept
from graphopt.model.backend_choice import Built, Chosen, choose, timed
from graphopt.model.bands import PerBand, band_of
from graphopt.model.comparing import Comparing
from graphopt.model.entries import BackendChoice, Specialisation, Verification
from graphopt.model.forward_passes import ForwardPasses
from graphopt.model.kept_steps import KeptStep, Steps, told_of
from graphopt.model.sampling import Renew, Sampled, of_all
from graphopt.model.specialiser import Setting
from graphopt.model.trial import Call, Trial, describe_call
from graphopt.model.variant import Variant
from graphopt.model.varying import readable
from graphopt.model.verification import Check, Stages
from graphopt.notices import telling
from graphopt.passbase import PassContext
from graphopt.pipeline.pipeline import VerifyLevel
from graphopt.pipeline.step import PassStep, parts_of

if TYPE_CHECKING:
    from graphopt.runtime.session import Session


@dataclass(frozen=True)
class _Compared:
    """What runs, and how it compared with eager.

    Attributes:
        choice: which backend runs it.
        built: with that.
        others: what other backends have built whose results are right, too.
        verification: how the results compared.
        said: what the user has to be told.
    """

    choice: BackendChoice
    built: Built
    others: Mapping[str, Built]
    verification: Verification
    said: tuple[str, ...] = ()


@dataclass
class Making:
    """One variant in the making.

    Args:
        recipe: how graphs are made.
        model: whose call it is.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        setting: what it is captured with.
        renewing: says what is done where a comparison of a later call finds something wrong.
        remember: take over what an earlier process has verified or made.
    """

    recipe: Recipe
    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    setting: Setting
    renewing: Callable[[Setting, bool], Renew]
    remember: bool
    _stages: Stages = field(init=False, default_factory=Stages)

    def __post_init__(self) -> None:
        recipe, session = self.recipe, self.setting.session
        verify = recipe.verify
        self._level: VerifyLevel = "structure" if verify.level == "eager" else verify.level
        self._ctx = PassContext(session.ranks, recipe.mesh, session.states, decided=session.decided)
        self._early = ForwardPasses(recipe.pipeline, self._ctx, self._level)
        self._remembers = self.remember and recipe.cache == "verified"
        self._steps = (
            Steps.of(recipe.pipeline, recipe.mesh, recipe.backend, verify.level, session)
            if self._remembers and not verify.every
            else None
        )
        self._name = type(self.model).__name__
        self._where = describe_call(self.model, self.args, self.kwargs)

    def variant(self) -> Variant:
        """Make it.

        Raises:
            CaptureError: the call cannot be captured.
            MismatchError: the graph computes something else than eager.
            RankError: a rank does not come, or has decided something else.
        """
        recipe, session, verify = self.recipe, self.setting.session, self.recipe.verify
        captured = self._capture()
        if isinstance(captured.behind, KeptStep):
            return self._again(captured, captured.behind)
        joint = captured.graph.level is Level.JOINT
        trains = joint and self.model.training
        roles = find_roles(captured.graph) if joint else {}  # before passes change the graph
        known = self._known(captured)
        compares = verify.compares and known.verification is None
        # Where sizes vary, what runs at others is compared when it first does.
        observes = compares or verify.every > 0 or (verify.compares and captured.symbolic)
        steps = self._rewrite(captured, observes=observes, checks=known.verification is None)
        chosen = self._choose(captured, steps)
        unverified = known.verification or Verification(str(verify), "not run")
        made = _Compared(chosen.choice, chosen.built, chosen.others, unverified)
        run = partial(recipe.run, session)
        forward = self.setting.forward
        comparing = Comparing(captured, self._stages, session, forward, verify, run)
        wrong: MismatchError | None = None
        if compares:
            check = comparing.first(self.model, self.args, self.kwargs)
            try:
                made = self._compare(check, made, partial(self._build, captured, steps))
            except MismatchError as error:
                wrong = error
        if trains and verify.compares:
            self._of_all(wrong)
        if wrong is not None:
            raise wrong
        parts = parts_of(steps)
        plan = recipe.plan_of(captured, captured.graph, parts, made.choice.backend)
        ran = remembered.ran(captured.graph, plan) if known.key else ""
        if known.other(ran):  # what was verified is not what would run
            return replace(self, remember=False).variant()
        if compares:
            remembered.remember(known.key, made.verification, ran)
        session.agree(plan, captured.functions if self.model.training else "")
        call = self._call(captured, chosen, made, comparing if observes else None)
        if verify.every:
            call = self._sampled(call, made.choice.backend, comparing.forgetful(), trains=trains)
        found, told = features.features_of(captured.graph), told_of(made.built.engine)
        behind = KeptStep(
            str(captured.graph.level),
            plan,
            made.built.engine,
            steps,
            made.choice,
            made.verification,
            found,
            roles,
        )
        keeps = self._steps and captured.digest and not captured.symbolic
        if self._steps and keeps and (ran or not compares):
            self._steps.keep(captured.digest, captured.graph, behind, told, ran)
        captured.finish()
        return self._of_step(captured, behind, call, made.said)

    def _capture(self) -> Capture:
        recipe, setting = self.recipe, self.setting
        with telling(f"capturing {self._name}", f"the first call with {self._where}"):
            captured = capture(
                self.model,
                self.args,
                self.kwargs,
                forward=setting.forward,
                numbers=setting.numbers,
                dimensions=setting.dimensions,
                rewrite=self._early.rewriter,
                symbols=not recipe.constant_sizes(),
                store=Store() if recipe.cache != "off" else None,
                varied=setting.varied,
                behind=self._steps.found if self._steps else lambda _: None,
            )
        if captured.keeps and captured.made and captured.graph.level is Level.JOINT:
            sizes = {name: ranks.size for name, ranks in setting.session.ranks.items()}
            check_kept(recipe.pipeline, sizes, captured.keeps[0], setting.forward)
        return captured

    def _known(self, captured: Capture) -> remembered.Known:
        """What an earlier process has found about this graph."""
        recipe = self.recipe
        if not (self._remembers and recipe.verify.compares):
            return remembered.known("")
        what = (captured.digest, recipe.pipeline, recipe.verify.level, recipe.backend)
        return remembered.known(remembered.key_of(*what, _place(self.setting.session)))

    def _rewrite(self, captured: Capture, *, observes: bool, checks: bool) -> tuple[PassStep, ...]:
        """Run the passes; with `observes` what each of them leaves is kept for comparisons."""
        pipeline = self.recipe.pipeline
        if observes:
            self._stages = self._early.stages(captured)
            pipeline = replace(pipeline, observers=(self._stages,))
        level: VerifyLevel = self._level if checks else "off"
        try:
            with keeping_garbage():
                return pipeline.run(captured.graph, self._ctx, level, self._early.steps)
        except InvariantError as error:
            trains = captured.graph.level is Level.JOINT and self.model.training
            if trains and self.recipe.verify.compares:
                self._of_all(MismatchError(error.message, hint=error.hint))
            raise

    # -- what runs it ------------------------------------------------------------------------------

    def _choose(self, captured: Capture, steps: tuple[PassStep, ...]) -> Chosen:
        """The backend, and what it has built."""
        requested = self.recipe.backend_for(self.setting.session)
        measured = "the faster of eager and Inductor runs it"
        why = measured if requested == "auto" else f"backend {requested!r}"
        build = partial(self._build, captured, steps)
        trial = Trial(self.model, self.args, self.kwargs, self.setting.session.trial)
        with telling(f"building {self._name}", f"{why}, once for each kind of call"):
            return choose(requested, build, trial, captured.graph, self._band(captured))

    def _build(self, captured: Capture, steps: tuple[PassStep, ...], backend: str) -> Built:
        session = self.setting.session
        return self.recipe.build(captured, captured.graph, parts_of(steps), session, backend)

    def _band(self, captured: Capture) -> int | None:
        """That of the sizes of the call, where sizes are symbols."""
        if not captured.symbolic:
            return None
        return band_of(captured.sizes_of(self.model, *self.args, **self.kwargs))

    def _call(
        self, captured: Capture, chosen: Chosen, made: _Compared, comparing: Comparing | None
    ) -> Call:
        """What runs calls: one backend, or one for each band of sizes."""
        band = self._band(captured)
        if chosen.bands is None or not made.others or band is None:
            return made.built.call
        calls = {name: built.call for name, built in made.others.items()}
        calls |= {made.choice.backend: made.built.call}
        later = comparing.forgetful().later if comparing else None
        measure = partial(timed, self.setting.session)
        return PerBand(chosen.bands, calls, captured.sizes_of, measure, band, later)

    # -- comparing with eager ----------------------------------------------------------------------

    def _compare(self, check: Check, made: _Compared, build: Callable[[str], Built]) -> _Compared:
        """What runs, compared; what `auto` has chosen is given up where it is wrong.

        Raises:
            MismatchError: it computes something else.
        """
        recipe, stages = self.recipe, self._stages.stages
        choice, built, others = made.choice, made.built, made.others
        said: tuple[str, ...] = ()
        with telling(f"comparing {self._name} with PyTorch eager", f"verify='{recipe.verify}'"):
            try:
                verification = check(stages, choice.backend, built.call)
            except BackendMismatchError as error:
                if recipe.backend != "auto" or self.setting.session.ranks:
                    raise
                choice, built = BackendChoice("eager", "auto", error.message), build("eager")
                others = {}
                said = (f"backend 'eager' runs, which backend='auto' leaves: {error}",)
                verification = check(stages, choice.backend, built.call)
            right = {}
            for name, other in others.items():
                try:
                    check(stages, name, other.call)
                    right[name] = other
                except BackendMismatchError as error:
                    said = (*said, f"backend {name!r} is used at no size: {error}")
        return _Compared(choice, built, right, verification, said)

    def _of_all(self, mine: MismatchError | None) -> None:
        """Raise on all ranks what one of them has found; once per graph that all have.

        Ranks make their first training graph at the same time, and later ones on their own.

        Raises:
            MismatchError: some rank has found it.
            RankError: a rank does not come.
        """
        session = self.setting.session
        topic = f"comparison {len(session.distrusted)}"
        if not session.ranks or session.content(topic):
            return
        wrong = of_all(session, topic, mine)
        if wrong is not None:
            raise wrong
        session.content(topic, now=True)

    def _sampled(self, call: Call, backend: str, comparing: Comparing, *, trains: bool) -> Sampled:
        """A call that is compared with eager every so many steps."""

        def compare(
            model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> Verification:
            name, now = backend, call
            if isinstance(call, PerBand):
                name, now = call.chosen(model, *args, **kwargs)
            return comparing.later(model, args, kwargs, name, now)

        renew, every = self.renewing(self.setting, trains), self.recipe.verify.every
        return Sampled(call, compare, renew, comparing.session, every, trains)

    # -- what comes out ----------------------------------------------------------------------------

    def _again(self, captured: Capture, step: KeptStep) -> Variant:
        """The variant of a step that an earlier process has made."""
        session = self.setting.session
        session.agree(step.plan, captured.functions if self.model.training else "")
        call = captured.bind(features.watched(step.engine, step.features))
        return self._of_step(captured, step, call, ())

    def _of_step(
        self, captured: Capture, step: KeptStep, call: Call, said: tuple[str, ...]
    ) -> Variant:
        entry = Specialisation(
            signature=self._where,
            level=step.level,
            route=captured.route,
            capture_seconds=captured.seconds,
            steps=step.steps,
            backend=step.backend,
            verification=step.verification,
            plan=step.plan,
            notes=captured.notes + features.note(step.features),
            sizes=captured.sizes,
            numbers=tuple(sorted(map(readable, captured.numbers))),
            unkept=captured.unkept,
        )
        return Variant(
            call,
            step.engine,
            captured.holds,
            captured.failure,
            entry,
            step.roles,
            numbers=captured.numbers,
            changed=captured.changed,
            warnings=said,
        )


def _place(session: Session) -> str:
    """Which rank this is: each compares on its own batch, whatever others have found."""
    places = ((n, r.group.rank(), r.size) for n, r in sorted(session.ranks.items()))
    return " ".join(f"{name}:{rank}/{size}" for name, rank, size in places)
