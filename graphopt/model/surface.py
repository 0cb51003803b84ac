"""The optimized model: the user's own object, with its class swapped for a subclass.

Only ``forward`` changes. Parameters, buffers, keys, hooks on the model itself, ``train()`` and
``eval()``, optimizers and everything else stay as they are, because the object stays as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from graphopt.errors import ArgumentError
from graphopt.model.controller import KEY, Controller, Specialiser, controller_of
from graphopt.model.report import Report

if TYPE_CHECKING:
    from graphopt.runtime.session import Session


def install(model: nn.Module, compiler: Specialiser, session: Session) -> Controller:
    """Swap the model's class; optimizing again replaces what was there."""
    old = controller_of(model)
    base = old.base if old else type(model)
    controller = Controller(base, compiler, session)
    # Raises for a bad plugin, so it comes before the model is touched.
    methods = tuple(m for m in session.methods() if not _has_own(model, m[0]))
    model.__class__ = _subclass(base, methods)
    object.__setattr__(model, KEY, controller)
    return controller


def _has_own(model: nn.Module, name: str) -> bool:
    """Whether the instance has an attribute, parameter, buffer or submodule of this name.

    The last three are only looked for when the class has nothing of that name.
    """
    own = model.__dict__
    return name in own or any(name in own[t] for t in ("_parameters", "_buffers", "_modules"))


# Name of a method, and the runtime part that has it: name and class.
Methods = tuple[tuple[str, tuple[str, type]], ...]

_subclasses: dict[tuple[type[nn.Module], Methods], type[nn.Module]] = {}


def _subclass(base: type[nn.Module], methods: Methods) -> type[nn.Module]:
    """The subclass of `base` that runs through the controller and looks like `base`."""
    if (base, methods) not in _subclasses:
        _subclasses[base, methods] = _make_subclass(base, methods)
    return _subclasses[base, methods]


def _make_subclass(base: type[nn.Module], methods: Methods) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        if _within_another_program():
            return base.forward(self, *args, **kwargs)
        controller: Controller = self.__dict__[KEY]
        return controller(self, args, kwargs)

    def explain(self: nn.Module) -> str:
        """What graphopt did to this model, what it declined, and why."""
        return report(self).explain()

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Pickle as the plain model: a capture belongs to a process."""
        reduced = cast("tuple[Any, ...]", base.__reduce_ex__(self, protocol))
        _, (_, *arguments), state, *rest = reduced
        state = {k: v for k, v in state.items() if k != KEY}
        return (_new, (base, *arguments), state, *rest)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """Copy as an optimized model with its own captures and its own pass state."""
        constructor, arguments, state, *_ = cast("tuple[Any, ...]", self.__reduce_ex__(4))
        plain: nn.Module = constructor(*arguments)
        memo[id(self)] = plain
        plain.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        controller = controller_of(self)
        assert controller is not None
        install(plain, controller.compiler, controller.session.copy(memo))
        return plain

    namespace = {
        "forward": forward,
        "explain": explain,
        "__reduce_ex__": reduce,
        "__deepcopy__": deepcopy,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    # The model's own attributes win over what runtime parts offer.
    offered = {name: _offered(owner, name, kind) for name, (owner, kind) in methods}
    taken = {*dir(base), *namespace}
    namespace |= {name: method for name, method in offered.items() if name not in taken}
    return type(base.__name__, (base,), namespace)


def _offered(owner: str, name: str, kind: type) -> Callable[..., object]:
    """A method of the runtime part `owner` as one of the model."""

    @functools.wraps(getattr(kind, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        controller = controller_of(self)
        assert controller is not None
        return getattr(controller.session.part(owner), name)(*args, **kwargs)

    return method


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
