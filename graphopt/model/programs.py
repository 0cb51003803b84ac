"""Programs of others that run an optimized model: there its own forward runs, and that is said."""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
import torch._dynamo
from torch.autograd import forward_ad


class Bypassable(Protocol):
    """The controller of a model, as far as it matters here."""

    def bypass(self) -> bool:
        """Note that torch.compile runs the plain forward."""


_TRACING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)

_numbers = itertools.count()
_controllers: weakref.WeakValueDictionary[int, Bypassable] = weakref.WeakValueDictionary()


def within_another_program() -> bool:
    """Whether somebody else captures or transforms what calls this model.

    These are torch.export, torch.jit.trace, torch.func's grad and vmap, forward-mode autograd, and
    FLOP counters.
    All of it is asked of this thread: `torch.compiler.is_compiling` speaks of the process.
    """
    return (
        any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or _counts_operators()
    )


def _counts_operators() -> bool:
    """Whether a FLOP counter is on: it asks by module, and a graph has none that are called."""
    modes = range(torch._C._len_torch_dispatch_stack())
    found = (type(torch._C._get_dispatch_stack_at(i)).__name__ for i in modes)
    return any(name.endswith("FlopCounterMode") for name in found)


def register(controller: Bypassable) -> int:
    """A number by which `bypassed` finds the controller."""
    number = next(_numbers)
    _controllers[number] = controller
    return number


def bypassed(number: int) -> bool:
    """Note that torch.compile runs the plain forward of a model; what is exported is a program."""
    if torch.compiler.is_exporting():
        return False
    controller = _controllers.get(number)
    return controller is not None and controller.bypass()


# So it runs as Python, once, while torch.compile reads a call.
torch._dynamo.assume_constant_result(bypassed)  # type: ignore[no-untyped-call]

BYPASSED = (
    "torch.compile reads this model's own forward, so graphopt does nothing there; leave "
    "torch.compile out (backend='inductor' generates code with the same compiler)"
)
