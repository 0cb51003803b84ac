"""Values that stay where they are while a forward runs, and get back what they had."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.model.copies import copy_of
from graphopt.model.iterators import is_iterator
from graphopt.model.places import Place, Value

# A NumPy array larger than this is data, not state.
ARRAY_BYTES = 1 << 24


class Globals(Place):
    """Those global variables that a function names.

    Compiled code may have read them already, so none is exchanged, see `Live`, but iterators, which
    only go forward.
    """

    def __init__(self, target: dict[str, Any], names: Iterable[str]) -> None:
        self._target = target
        self._saved = {name: target[name] for name in names if name in target}
        self._absent = [name for name in names if name not in target]

    def items(self) -> Iterable[tuple[object, Any]]:
        """See `Place`."""
        return self._saved.items()

    def exchange(self, swap: Value) -> None:
        """See `Place`."""
        for name, value in self._saved.items():
            if is_iterator(value):
                self._target[name] = swap(value)

    def restore(self) -> None:
        """See `Place`."""
        for name, value in self._saved.items():
            if self._target.get(name, self) is not value:
                self._target[name] = value
        for name in self._absent:
            # What is imported stays so.
            if name in self._target and not isinstance(self._target[name], ModuleType):
                del self._target[name]


class Class(Place):
    """Attributes of a class; as of `Globals`, only iterators are exchanged."""

    def __init__(self, target: type) -> None:
        self._target = target
        self._saved = dict(vars(target))

    def items(self) -> Iterable[tuple[object, Any]]:
        """See `Place`."""
        return self._saved.items()

    def exchange(self, swap: Value) -> None:
        """See `Place`."""
        for name, value in self._saved.items():
            if is_iterator(value):
                type.__setattr__(self._target, name, swap(value))

    def restore(self) -> None:
        """See `Place`."""
        now = dict(vars(self._target))
        for name, value in self._saved.items():
            if now.pop(name, self) is not value:
                type.__setattr__(self._target, name, value)
        for name in now:
            if not name.startswith("__"):  # Python's own, which it makes when they are asked for
                type.__delattr__(self._target, name)


class Live(Place):
    """A tensor that cannot be exchanged; its values are put back where forward wrote to them."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._version = None if target.is_inference() else target._version
        self._saved = copy_of(target)

    def restore(self) -> None:
        """See `Place`."""
        if self._version is None or self._target._version != self._version:
            with torch.inference_mode(self._version is None), torch.no_grad():
                self._target.copy_(self._saved)
            self._version = None if self._version is None else self._target._version


class Stream(Place):
    """A random generator that the model or the call has of its own."""

    _METHODS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("get_state", "set_state"),
        ("getstate", "setstate"),
    )

    def __init__(self, target: Any) -> None:
        self._target = target
        self._saved = self._state()

    @staticmethod
    def holds(value: object) -> bool:
        """Whether a value is a random generator."""
        numpy = sys.modules.get("numpy")
        kinds: tuple[type, ...] = (torch.Generator, random.Random)
        if numpy is not None:
            kinds += (numpy.random.Generator, numpy.random.RandomState)
        return isinstance(value, kinds)

    def _state(self) -> Any:
        for read, _ in self._METHODS:
            if hasattr(self._target, read):
                return getattr(self._target, read)()
        return self._target.bit_generator.state

    def restore(self) -> None:
        """See `Place`."""
        for _, write in self._METHODS:
            if hasattr(self._target, write):
                getattr(self._target, write)(self._saved)
                return
        self._target.bit_generator.state = self._saved


class Array(Place):
    """A NumPy array that is small enough to be state."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._saved = target.copy()

    @staticmethod
    def holds(value: Any) -> bool:
        """Whether a value is such an array."""
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(value, numpy.ndarray):
            return False
        return value.nbytes <= ARRAY_BYTES and bool(value.flags.writeable)

    def restore(self) -> None:
        """See `Place`."""
        if self._target.tobytes() != self._saved.tobytes():
            self._target[...] = self._saved
