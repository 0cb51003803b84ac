"""The optimized model: the user's own object, with its class swapped for a subclass.

Only ``forward`` changes. Parameters, buffers, keys, hooks on the model itself, ``train()`` and
``eval()``, optimizers and everything else stay as they are, because the object stays as it is.
"""

from __future__ import annotations

import copy
import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from graphopt.errors import ArgumentError
from graphopt.model.controller import KEY, Compiler, Controller, controller_of
from graphopt.model.report import Report


def install(model: nn.Module, compiler: Compiler) -> Controller:
    """Swap the model's class; optimizing again replaces what was there."""
    old = controller_of(model)
    base = old.base if old else type(model)
    controller = Controller(base, compiler)
    object.__setattr__(model, KEY, controller)
    model.__class__ = _subclass(base)
    return controller


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
        controller: Controller = self.__dict__[KEY]
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
