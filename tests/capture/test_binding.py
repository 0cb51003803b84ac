"""Guards take the arguments of a call by name as `inspect.Signature.bind` does, only faster."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from graphopt.capture.guards import Guard


def _plain(self: Any, x: Any, y: Any = 2) -> None: ...


def _named(self: Any, x: Any, *, y: Any, z: Any = 3) -> None: ...


def _rest(self: Any, x: Any = 1, **kw: Any) -> None: ...


def _variable(self: Any, *a: Any, **k: Any) -> None: ...


def _all(self: Any, x: Any, y: Any = 2, *, z: Any = 3, **kw: Any) -> None: ...


def _positional(self: Any, x: Any, /, y: Any = 1) -> None: ...


@pytest.mark.parametrize("forward", [_plain, _named, _rest, _variable, _all, _positional])
def test_arguments_are_bound_as_python_binds_them(forward: Callable[..., None]) -> None:
    guard, signature = Guard(forward), inspect.signature(forward)
    names = ["self", "x", "y", "z", "w", "kw"]
    for count, number in itertools.product(range(5), range(4)):
        for chosen in itertools.combinations(names, number):
            args, kwargs = tuple(range(count)), {name: object() for name in chosen}
            try:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                expected = dict(bound.arguments)
            except TypeError:
                expected = None
            found = guard._bound(args, kwargs)
            assert (None if found is None else dict(found)) == expected, (args, chosen)
