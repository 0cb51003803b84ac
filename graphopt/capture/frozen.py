"""What Dynamo reads once, and would freeze into the graph without a guard: refused.

Draws from a `random.Random` of one's own, and how often a tensor was changed (``_version``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest import mock

from torch._dynamo.exc import unimplemented
from torch._dynamo.variables.misc import RandomClassVariable, RandomVariable
from torch._dynamo.variables.tensor import TensorVariable


@contextmanager
def refusing_frozen_values() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    refuse_unseeded = _unless_seeded(RandomClassVariable.call_function)
    with (
        mock.patch.object(RandomVariable, "call_method", _of_own(RandomVariable.call_method)),
        mock.patch.object(RandomClassVariable, "call_function", refuse_unseeded),
        mock.patch.object(TensorVariable, "method_attr__version", _version),
    ):
        yield


def _of_own(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        # One that forward makes and seeds itself draws the same at every call.
        if self.source is not None:
            _refuse(name)
        return original(self, tx, name, args, kwargs)

    return call_method


def _unless_seeded(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if not kwargs and (not args or args[0].is_constant_none()):
            _refuse("__init__")
        return original(self, tx, args, kwargs)

    return call_function


def _refuse(name: str) -> NoReturn:
    unimplemented(
        gb_type="A random number generator of one's own",
        context=f"{random.Random.__name__}.{name}",
        explanation="What it draws would be frozen into the graph.",
        hints=[],
    )


def _version(self: Any, tx: Any) -> NoReturn:
    unimplemented(
        gb_type="Reads how often a tensor was changed: _version",
        context=str(self),
        explanation="The number would be frozen into the graph.",
        hints=[],
    )
