"""Makes variants of what can be trusted, and does without what a comparison has found wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.capture.forward import Rewriter
from graphopt.compiler.making import Making
from graphopt.compiler.recipe import Recipe
from graphopt.errors import MismatchError
from graphopt.model.comparing import Args, Kwargs
from graphopt.model.falling_back import sentence, without, words
from graphopt.model.forward_passes import ForwardPasses
from graphopt.model.parametrize import named_parameters
from graphopt.model.replacing import Replacement
from graphopt.model.report import Report
from graphopt.model.sampling import Renew, Renewed, plainly
from graphopt.model.specialiser import Setting, Specialiser
from graphopt.model.surface import plain_forward
from graphopt.model.variant import Variant
from graphopt.passbase import PassContext
from graphopt.pipeline.step import parts_of
from graphopt.plan import Plan

if TYPE_CHECKING:
    from graphopt.runtime.session import Session


@dataclass(frozen=True)
class Compiler(Recipe, Specialiser):
    """What makes the variants of one model."""

    def report(self, model: str, *, in_ddp: bool = False) -> Report:
        """An empty report for a model of this class name."""
        notes = self.notes(in_ddp)
        return Report(model=model, spec=str(self.pipeline), specialisations=(), notes=notes)

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
        return self.plan_of(captured, captured.graph, parts_of(steps), backend)

    def compile(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        setting: Setting,
        *,
        remember: bool = True,
    ) -> Variant:
        """Capture, rewrite, check and build the variant for one call.

        With `remember`, what an earlier process has verified is not verified again. What is found
        wrong runs no more, where the user allows that (`on_mismatch`), in this variant and in all
        that follow.
        """
        session = setting.session
        trusted = self._trusted(model, session)
        renewing = self._renewing
        try:
            variant = Making(trusted, model, args, kwargs, setting, renewing, remember).variant()
        except MismatchError as error:
            if not trusted._distrust(error, model, session):
                raise
            variant = self.compile(model, args, kwargs, setting, remember=False)
            said = sentence(error.guilty, error)
            return replace(variant, warnings=(said, *variant.warnings))
        if not session.distrusted:
            return variant
        fallen_back = tuple(f"{words(g)}: {why}" for g, why in session.distrusted.items())
        return replace(variant, entry=replace(variant.entry, fallen_back=fallen_back))

    def _trusted(self, model: nn.Module, session: Session) -> Compiler:
        """Without what was found wrong."""
        found: Compiler = self
        for guilty in session.distrusted:
            left = without(guilty, found.pipeline, found.backend, model, job=session.in_job)
            if left is not None:
                found = replace(found, pipeline=left[0], backend=left[1])
        return found

    def _distrust(self, error: MismatchError, model: nn.Module, session: Session) -> bool:
        """Whether something may run in place of what is wrong; all ranks say the same."""
        backend = "inductor" if self.backend == "auto" else self.backend
        left = without(error.guilty, self.pipeline, backend, model, job=session.in_job)
        # What `auto` has chosen is given up without being told.
        automatic = self.backend == "auto" and error.guilty.startswith("backend")
        if left is None or not (self.on_mismatch == "warn" or automatic):
            return False
        session.distrusted[error.guilty] = error.message
        return True

    def _renewing(self, setting: Setting, trains: bool) -> Renew:
        """What is done where a later comparison finds something wrong."""
        session = setting.session

        def renew(
            error: MismatchError | None, model: nn.Module, args: Args, kwargs: Kwargs
        ) -> Renewed:
            # One rank cannot have other passes than the others.
            job = session.in_job
            trusted = self._trusted(model, session)
            goes_on = error is None or not job or trains
            if error is not None and not (goes_on and trusted._distrust(error, model, session)):
                if self.on_mismatch == "raise" or (job and trains):
                    raise error
                return plainly(session, setting.forward, error, self.on_mismatch)
            variant = self.compile(model, args, kwargs, setting, remember=False)
            said = () if error is None else (sentence(error.guilty, error),)
            return Renewed(variant.call, (*said, *variant.warnings), variant)

        return renew

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
