"""Which specialisation runs a call of one model, and what makes new ones."""

from __future__ import annotations

import functools
import logging
import threading
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.capture import is_uninitialised
from graphopt.capture.checkpoints import within_checkpoint
from graphopt.capture.flat import first_line
from graphopt.capture.lock import is_tracing, one_at_a_time
from graphopt.capture.sizes import NONE, Dimensions, Named
from graphopt.errors import GraphoptError, RankError
from graphopt.model.dimensions import Seen
from graphopt.model.kinds import Kind, PlainKinds, kind_of
from graphopt.model.plain import Refusal, reduces, refuse, run_plain
from graphopt.model.programs import BYPASSED
from graphopt.model.report import Report
from graphopt.model.sites import (
    MAX_SPECIALISATIONS,
    Site,
    Sites,
    changes_of,
    variables_of,
)
from graphopt.model.specialiser import Setting, Specialiser
from graphopt.model.trial import describe_call
from graphopt.model.variant import Variant
from graphopt.model.varying import Cause, Varying, cause_of
from graphopt.notices import warn

if TYPE_CHECKING:
    from graphopt.model.unrun import Unrun
    from graphopt.runtime.session import Session
    from graphopt.runtime.validation import Form

log = logging.getLogger("graphopt")

_NO_NUMBERS: frozenset[str] = frozenset()

WRAPPED = (
    "DistributedDataParallel is around this model, whose passes reduce its gradients already, so "
    "they are reduced twice: leave DistributedDataParallel out, or optimize(..., passes='cleanup')"
)

# Where the controller lies in the model's own dictionary.
KEY = "_graphopt"


class Controller:
    """Chooses the specialisation for each call of one model, and makes new ones.

    An error in a call is that call's: captures and state stay.

    Args:
        plain: the model's own forward, unbound.
        compiler: makes variants; holds the arguments of `optimize`.
        session: what the model keeps between its steps.
        own: the forward that the user had put on the instance, if any.
    """

    def __init__(
        self,
        plain: Callable[..., Any],
        compiler: Specialiser,
        session: Session,
        own: Callable[..., Any] | None = None,
    ) -> None:
        self.plain = plain
        self.own = own
        self.compiler = compiler
        self.session = session
        self.surface: dict[str, types.MethodType] = {}
        # Replaced as a whole, so that a thread may go through it while another one changes it.
        self.variants: tuple[Variant, ...] = ()
        self.made = 0
        self.trained = False
        self.kinds = PlainKinds()
        self.varying = Varying()
        self.seen = Seen(compiler.dynamic)
        self.sites = Sites()
        self.notes: tuple[str, ...] = ()
        self._untold: list[str] = []
        self.in_ddp = False
        self.unrun: Unrun | None = None
        self.hooks: frozenset[int] = frozenset()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """Captures belong to a process and to one model."""
        return (type(None), ())

    def __call__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        """Run the variant whose conditions hold; make one where none does."""
        if self.session.before_call is not None:
            self.session.before_call()
        if self.unrun is not None:
            self.called()
        if self.session.ranks and not self.in_ddp:
            self._look_for_ddp()
        if self.seen.limited:
            self.seen.declared.check(model, args, kwargs)
        for variant in self.variants:
            if variant.holds(model, *args, **kwargs):
                if variant is not self.variants[0]:
                    self._put_first(variant)
                return variant.call(model, *args, **kwargs)
        return self._first_call(model, args, kwargs)

    def replaced(self, plain: Callable[..., Any]) -> None:
        """Go on with another forward, which the class of the model has by now."""
        with self._lock:
            self.plain, self.variants = plain, ()
            self.kinds, self.sites = PlainKinds(), Sites()

    def _say_hooked(self, number: int, error: GraphoptError) -> None:
        """Calls under hooks of a summary or a profiler run plain, and later ones are captured."""
        warn(
            f"{number} forward hooks that were hung on the model after optimize cannot be "
            f"captured, so this call runs as plain PyTorch: {error.message}"
        )

    def called(self) -> None:
        """Note that the forward has been called."""
        if self.unrun is not None:
            self.unrun.remove()
            self.unrun = None

    def note(self, said: str) -> None:
        """Keep a sentence for the report."""
        self.notes += (said,)

    def _look_for_ddp(self) -> None:
        """Note that DistributedDataParallel is around; say once if gradients are reduced twice."""
        wrapper: Any = nn.parallel.DistributedDataParallel
        if wrapper._get_active_ddp_module() is None:
            return
        self.in_ddp = True
        if not self.session.ranks:
            return
        self.notes += (WRAPPED,)
        warn(WRAPPED)

    def _first_call(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> object:
        """A call that no variant is made for."""
        if not self.in_ddp:
            self._look_for_ddp()
        # A first call draws parameters, as eager's does; what is checkpointed is called again.
        if is_uninitialised(model) and not within_checkpoint():
            return self.plain(model, *args, **kwargs)
        kind = kind_of(model, args, kwargs)
        if kind in self.kinds or self._ended(model, args, kwargs):
            return run_plain(self.session, self.plain, model, args, kwargs)
        site = self.sites.of(kind.mode, model)
        if site.enough:
            self._end(site, model)
            return run_plain(self.session, self.plain, model, args, kwargs)
        try:
            with one_at_a_time():
                # Another thread may have made it meanwhile.
                variant = self._holding(model, args, kwargs)
                variant = variant or self._specialise(model, args, kwargs)
        except Exception as error:
            call = (self.session, self.plain, model, args, kwargs)
            remember = functools.partial(self._remember, kind, model, args, kwargs)
            if hung := hooks_of(model) - self.hooks:
                remember = functools.partial(self._say_hooked, len(hung))
            trained = self.trained or bool(hung)
            return refuse(Refusal(*call, error), self.compiler, trained, remember)
        self._tell()
        self.trained |= variant.entry.level == "joint"
        # Not by a variable: what was raised and caught on the way may keep this frame for a while.
        return variant.call(model, *args, **kwargs)

    def variant(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Variant:
        """The variant whose conditions hold for a call, made where none does; it is not run."""
        self.called()
        found = self._holding(model, args, kwargs)
        if found is None:
            site = self.sites.of(kind_of(model, args, kwargs).mode, model)
            if site.enough:
                raise site.too_many(type(model).__name__)
            with one_at_a_time():
                found = self._holding(model, args, kwargs) or self._specialise(model, args, kwargs)
            self._tell()
        self.trained |= found.entry.level == "joint"
        return found

    def specialise(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Variant:
        """Make the variant for this call; an error leaves everything as it was."""
        variant = self._specialise(model, args, kwargs)
        self._tell()
        return variant

    def _specialise(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Variant:
        with one_at_a_time():
            mode = kind_of(model, args, kwargs).mode
            site = self.sites.of(mode, model)
            before = next((v for v in self.variants if v.mode == mode), None)
            reason = before.failure(model, *args, **kwargs) if before else ""
            causes = self._causes(model, args, kwargs)
            sizes = self.seen.look(model, args, kwargs)
            variables = variables_of(self.plain, model, args, kwargs)
            changes = changes_of(reason, sizes, variables) if site.captures else ()
            # Conditions on sizes fail first, so numbers go unnoticed as long as sizes change.
            beside = before.changed(model, *args, **kwargs) if before and sizes else ()
            changing = dict.fromkeys((*causes, *filter(None, map(cause_of, beside))))
            made = self._compile(model, args, kwargs, tuple(changing))
            entry = replace(made.entry, because=", ".join(map(str, changes)))
            variant = replace(made, entry=entry, mode=mode)
            self.seen.captured(entry.sizes, model, args, kwargs)
            self.made += 1
            self._untold += variant.warnings
            symbols = {size.name for size in entry.sizes if not size.fixed}
            many = site.captured(changes, symbols)
            self._keep(variant, site)
        if entry.because:
            log.info("captured again for %s, because %s", entry.signature, entry.because)
        for cause in self.varying.count(c for c in causes if c.source not in variant.numbers):
            self._say_ended(cause)
        if many:
            self._untold.append(site.many(type(model).__name__, self.seen.why))
        return variant

    def _keep(self, variant: Variant, site: Site) -> None:
        """Keep a new variant, and drop the one of its site that ran longest ago."""
        with self._lock:
            others = [v for v in self.variants if v.mode == variant.mode]
            dropped = others[MAX_SPECIALISATIONS - 1 :]
            kept = (v for v in self.variants if not any(v is one for one in dropped))
            self.variants = (variant, *kept)
        for one in dropped:
            site.drop(one.entry.signature)

    def _compile(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        causes: Sequence[Cause],
    ) -> Variant:
        """With what changes as inputs of the graph, where that can be done."""
        tried = self.varying.to_try(causes)
        dimensions = self.seen.symbols(model, args, kwargs)
        constant = self.compiler.constant_sizes() if dimensions else ""
        attempts = dict.fromkeys((tried, _NO_NUMBERS)) if dimensions and not constant else ()
        for numbers in attempts:
            try:
                variant = self._make(model, args, kwargs, numbers, dimensions)
            except RankError:
                raise
            except Exception as error:  # whatever it is, a static graph may do without
                log.info("sizes cannot be symbols of the graph: %s", error)
                constant = getattr(error, "message", "") or first_line(error)
                continue
            self.varying.learn(tried, variant.numbers)
            self.seen.made(variant.entry.sizes, model, args, kwargs)
            return variant
        variant = self._compile_static(model, args, kwargs, tried)
        if dimensions and (said := self.seen.refused(model, args, kwargs, constant)):
            self._untold.append(said)
        return variant

    def _compile_static(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tried: frozenset[str],
    ) -> Variant:
        """With these numbers as inputs of the graph, where that can be done; sizes are fixed."""
        if tried:
            try:
                variant = self._make(model, args, kwargs, tried)
            except RankError:
                raise
            except GraphoptError as error:
                log.info("%s cannot be inputs of the graph: %s", sorted(tried), error.message)
                self.varying.learn(tried, _NO_NUMBERS)
            else:
                self.varying.learn(tried, variant.numbers)
                return variant
        variant = self._make(model, args, kwargs, varied=self._varied(model, args, kwargs))
        self.varying.learn(_NO_NUMBERS, variant.numbers)
        return variant

    def _make(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        numbers: frozenset[str] = _NO_NUMBERS,
        sizes: Dimensions = NONE,
        varied: Named = lambda _: NONE,
    ) -> Variant:
        setting = Setting(self.plain, self.session, numbers, sizes, varied)
        return self.compiler.compile(model, args, kwargs, setting)

    def _varied(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Named:
        """Which sizes of a call a kept capture may have as symbols, though none has varied yet."""

        def named(names: Collection[str]) -> Dimensions:
            return self.seen.named(names, model, args, kwargs)

        return (lambda _: NONE) if self.compiler.constant_sizes() else named

    def _causes(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[Cause]:
        """The changing values that keep variants from holding for this call."""
        found: dict[Cause, None] = {}
        for variant in self.variants:
            cause = cause_of(variant.failure(model, *args, **kwargs))
            if cause is None:
                continue
            found[cause] = None
            # Dynamo stops at the first condition that does not hold.
            others = variant.changed(model, *args, **kwargs) if cause.number else ()
            found |= {other: None for text in others if (other := cause_of(text)) is not None}
        return list(found)

    def _ended(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether what changed since all captures has made captures enough."""
        return self.varying.any_ended and self.varying.ended(self._causes(model, args, kwargs))

    def _holding(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Variant | None:
        return next((v for v in self.variants if v.holds(model, *args, **kwargs)), None)

    def _put_first(self, variant: Variant) -> None:
        with self._lock:
            if any(v is variant for v in self.variants):
                self.variants = (variant, *(v for v in self.variants if v is not variant))

    def _say_ended(self, cause: Cause) -> None:
        what = "changes" if cause.number else "changes its length"
        note = (
            f"{cause.name} {what} from call to call and made {cause.limit} captures more, so calls "
            f"with further values run plain (read at: {cause.line})"
        )
        self.notes += (note,)
        self._untold.append(
            f"{note}. Keep the value in a tensor (register_buffer), or outside of forward."
        )

    def _tell(self) -> None:
        """Warn of what was found while variants were made.

        Not meanwhile: where warnings are errors, they would end what is being made.
        """
        while self._untold:
            warn(self._untold.pop(0))

    def _end(self, site: Site, model: nn.Module) -> None:
        """Say once that calls of a site run plain from now on; raise where they must not."""
        error = site.too_many(type(model).__name__)
        if reduces(self.session) and model.training:
            raise RankError(
                f"{error.message}, and a plain call would leave gradients unreduced across ranks",
                hint=error.hint,
            )
        if self.compiler.fallback == "error":
            raise error
        if not site.ended:
            self.notes += (site.end(type(model).__name__),)

    def bypass(self) -> bool:
        """Note that torch.compile runs the plain forward.

        Raises:
            RankError: in a job, where gradients would stay unreduced.
        """
        if is_tracing():
            return False
        self.called()
        if reduces(self.session):
            raise RankError(
                f"{BYPASSED}: gradients would not be reduced across ranks",
                hint="call the optimized model itself",
            )
        if BYPASSED not in self.notes:
            self.notes += (BYPASSED,)
            warn(BYPASSED)
        return True

    def report(self, model: nn.Module) -> Report:
        """What was done so far, newest specialisation last."""
        report = self.compiler.report(type(model).__name__, in_ddp=self.in_ddp)
        return replace(
            report,
            specialisations=tuple(v.reported for v in reversed(self.variants)),
            notes=(
                *report.notes,
                *self.session.notes(),
                *self.notes,
                *self.seen.notes.values(),
                *self.sites.notes(),
            ),
            plain=self.kinds.entries(),
            forms=self._forms(),
        )

    def _forms(self) -> tuple[Form, ...]:
        validation = self.session.validation
        return () if validation is None else tuple(validation.forms.values())

    def _remember(
        self,
        kind: Kind,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        error: GraphoptError,
    ) -> None:
        """Run calls of this kind plain from now on, and say so once."""
        entry = self.kinds.add(kind, describe_call(model, args, kwargs), error)
        at = f" at {entry.where}" if entry.where else ""
        later = "; so do all later calls in this mode that are captured not yet"
        warn(
            f"calls of {type(model).__name__} with {entry.signature} run as plain PyTorch, without "
            f"the passes{later if entry.every_later else ''}: {entry.reason}{at}"
        )


def hooks_of(model: nn.Module) -> frozenset[int]:
    """The forward hooks inside of a model, by the numbers that torch gives them."""
    tables = ((m._forward_hooks, m._forward_pre_hooks) for m in model.modules())
    return frozenset(number for pair in tables for table in pair for number in table)


def controller_of(model: nn.Module) -> Controller | None:
    """The controller of an optimized model; ``None`` for any other."""
    found = model.__dict__.get(KEY)
    return found if isinstance(found, Controller) else None
