"""The optimized model: the user's own object, with its class swapped for a subclass.

Only ``forward`` changes. Parameters, buffers, keys, hooks on the model itself, ``train()`` and
``eval()``, optimizers and everything else stay as they are, because the object stays as it is.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from graphopt.curvature import notes
from graphopt.errors import ArgumentError
from graphopt.report import Report, Specialisation

log = logging.getLogger("graphopt")

# How many specialisations one model keeps; the least recently used one goes first.
MAX_SPECIALISATIONS = 8

_KEY = "_graphopt"


@dataclass(frozen=True)
class Variant:
    """One specialisation, ready to run.

    Attributes:
        call: takes the model and the call's arguments.
        engine: what runs the graph.
        holds: whether a call is one that this variant was made for.
        failure: which condition of `holds` a call does not meet.
        entry: what is reported about it.
    """

    call: Callable[..., object]
    engine: Callable[..., Any]
    holds: Callable[..., bool]
    failure: Callable[..., str]
    entry: Specialisation


class Compiler(Protocol):
    """What makes variants; `graphopt.api` has the one there is.

    Attributes:
        workers: the ranks that gradients are reduced over, or ``None``.
    """

    @property
    def workers(self) -> Any:
        """See above."""

    def compile(
        self,
        model: nn.Module,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        state: dict[str, Tensor],
    ) -> Variant:
        """The variant for one call."""

    def report(self, model: str) -> Report:
        """A report without specialisations, for a model of this class name."""


class Controller:
    """Chooses the specialisation for each call of one model, and makes new ones.

    Args:
        base: the model's own class.
        compiler: makes variants; holds the arguments of `optimize`.

    Attributes:
        state: tensors that passes own, by name.
    """

    def __init__(self, base: type[nn.Module], compiler: Compiler) -> None:
        self.base = base
        self.compiler = compiler
        self.state: dict[str, Tensor] = {}
        self.variants: list[Variant] = []
        self.made = 0

    def __call__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        """Run the variant whose conditions hold; make one where none does."""
        for index, variant in enumerate(self.variants):
            if variant.holds(model, *args, **kwargs):
                if index:
                    self.variants.insert(0, self.variants.pop(index))
                return variant.call(model, *args, **kwargs)
        return self.specialise(model, args, kwargs).call(model, *args, **kwargs)

    def specialise(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Variant:
        """Make the variant for this call; on any error the model is given back as it was."""
        reason = self.variants[0].failure(model, *args, **kwargs) if self.variants else ""
        try:
            variant = self.compiler.compile(model, self.base.forward, args, kwargs, self.state)
        except BaseException:
            restore(model)
            raise
        self.made += 1
        self.variants.insert(0, variant)
        if reason:
            log.info("captured again for %s, because of %s", variant.entry.signature, reason)
        if len(self.variants) > MAX_SPECIALISATIONS:
            self.variants.pop()
            if self.made == MAX_SPECIALISATIONS + 1:
                warnings.warn(
                    f"this model was captured {self.made} times, for as many kinds of calls (the "
                    f"last: {variant.entry.signature}, because of {reason}); only "
                    f"{MAX_SPECIALISATIONS} are kept. Pad or bucket the inputs to a few shapes.",
                    stacklevel=5,
                )
        return variant

    def settle(self) -> None:
        """Have in `state` what a step left under way; what is loaded into it then counts."""
        if self.compiler.workers is not None:
            self.compiler.workers.settle(self.state)

    def report(self, model: nn.Module) -> Report:
        """What was done so far, newest specialisation last."""
        report = self.compiler.report(type(model).__name__)
        return replace(
            report,
            specialisations=tuple(v.entry for v in reversed(self.variants)),
            notes=report.notes + notes(self.state),
        )


def controller_of(model: nn.Module) -> Controller | None:
    """The controller of an optimized model; ``None`` for any other."""
    found = model.__dict__.get(_KEY)
    return found if isinstance(found, Controller) else None


def install(model: nn.Module, compiler: Compiler) -> Controller:
    """Swap the model's class; optimizing again replaces what was there."""
    old = controller_of(model)
    base = old.base if old else type(model)
    controller = Controller(base, compiler)
    object.__setattr__(model, _KEY, controller)
    model.__class__ = _subclass(base)
    return controller


def restore(model: nn.Module) -> None:
    """Give the model its own class back."""
    controller = controller_of(model)
    if controller is not None:
        model.__class__ = controller.base
        del model.__dict__[_KEY]


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that runs through the controller and looks like `base`."""
    if base not in _subclasses:
        _subclasses[base] = _make_subclass(base)
    return _subclasses[base]


def _make_subclass(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        if _within_another_program():
            return base.forward(self, *args, **kwargs)
        controller: Controller = self.__dict__[_KEY]
        return controller(self, args, kwargs)

    def explain(self: nn.Module) -> str:
        """What graphopt did to this model, what it declined, and why."""
        return report(self).explain()

    def no_sync(self: nn.Module) -> AbstractContextManager[None]:
        """Within, steps keep this rank's own gradients; the next step outside reduces the sum."""
        workers = _workers_of(self)
        return nullcontext() if workers is None else workers.silent()

    def noise_scale(self: nn.Module) -> float | None:
        """Gradient noise scale in examples (McCandlish et al., arXiv 1812.06162, eq. 2.9).

        Measured every few steps from the gradients before and after their reduction; ``None`` on
        one rank, with a wire other than ``native``, and before there is an estimate.
        """
        workers = _workers_of(self)
        line = getattr(workers, "line", None)
        return None if line is None else line.noise.value

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Pickle as the plain model: a capture belongs to a process."""
        reduced = cast("tuple[Any, ...]", base.__reduce_ex__(self, protocol))
        _, (_, *arguments), state, *rest = reduced
        state = {k: v for k, v in state.items() if k != _KEY}
        return (_new, (base, *arguments), state, *rest)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """Copy as an optimized model with its own captures and its own pass state."""
        constructor, arguments, state, *_ = cast("tuple[Any, ...]", self.__reduce_ex__(4))
        plain: nn.Module = constructor(*arguments)
        memo[id(self)] = plain
        plain.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        controller = controller_of(self)
        assert controller is not None
        controller.settle()
        compiler: Any = controller.compiler
        if compiler.workers is not None:
            compiler = replace(compiler, workers=compiler.workers.copy())
        copied = install(plain, compiler)
        copied.state = copy.deepcopy(controller.state, memo)
        copied.settle()
        return plain

    namespace = {
        "forward": forward,
        "explain": explain,
        "no_sync": no_sync,
        "noise_scale": noise_scale,
        "__reduce_ex__": reduce,
        "__deepcopy__": deepcopy,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), namespace)


def _workers_of(model: nn.Module) -> Any:
    controller = controller_of(model)
    return None if controller is None else controller.compiler.workers


def _within_another_program() -> bool:
    """Whether somebody else captures or transforms what calls this model (compile, grad, vmap)."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _new(cls: type[nn.Module], *arguments: Any) -> nn.Module:
    """An empty instance for unpickling; pickle insists on the object's own class elsewhere."""
    return cls.__new__(cls, *arguments)


def report(model: nn.Module) -> Report:
    """The report of an optimized model; raises ``ArgumentError`` for any other."""
    controller = controller_of(model)
    if controller is None:
        raise ArgumentError(
            f"this {type(model).__name__} is not optimized",
            hint="call graphopt.optimize(model) first",
        )
    return controller.report(model)
