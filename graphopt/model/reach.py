"""Everything that forward can reach from a model and the arguments of a call, and how to undo it.

The user's own objects stay in their places: modules, containers and plain objects are remembered as
they are, their tensors are exchanged for stand-ins, and afterwards each is put back as it was.
Whatever path a forward takes to them (a closure, a bound method, a hook) leads to the stand-ins.

Not reached are the insides of other packages' objects (datasets, tokenizers, loggers), files, and
Python objects that only a function called by forward knows, by a global name of its own module.
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from types import CellType, CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.model.copies import StandIns
from graphopt.model.places import Attributes, Cell, Deque, Dict, List, Place, Set, Value
from graphopt.model.values import Array, Globals, Live, Stream

# A model that holds more objects than this is followed no further.
LIMIT = 200_000

_ATOMS = frozenset(
    {int, float, str, bool, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size}
)
# Packages whose objects keep no state of a step, or keep the world (a trainer, a data loader).
_CLOSED = frozenset(
    {
        *("torch", "numpy", "builtins", "types", "typing", "abc", "enum", "functools", "inspect"),
        *("importlib", "logging", "threading", "_thread", "multiprocessing", "concurrent"),
        *("asyncio", "queue", "weakref", "io", "os", "pathlib", "re", "datetime", "decimal"),
        *("fractions", "sympy", "triton", "tokenizers", "lightning", "pytorch_lightning"),
        *("wandb", "tensorboard", "pandas"),
    }
)
# Functions of these keep no state of a step in globals.
_LIBRARIES = frozenset({"torch", "torchvision", "timm", "transformers", "functools", "contextlib"})
_OPEN = ("torch.distributions.",)
_OWN = ("graphopt.model.", "graphopt.runtime.", "graphopt.api")
_CONTAINERS: dict[type, Callable[[Any], Place]] = {dict: Dict, list: List, deque: Deque, set: Set}
_ITERATORS: tuple[type, ...] = (
    itertools.count,
    itertools.cycle,
    itertools.islice,
    type(iter([])),
    type(iter(())),
)


class Reach:
    """What can be reached.

    Args:
        model: the module.
        arguments: of the call, by name.

    Attributes:
        tensors: all of them that are exchanged, by name.
    """

    def __init__(self, model: nn.Module, arguments: dict[str, object]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._places: list[Place] = []
        self._seen: dict[int, object] = {}
        self._queue: deque[tuple[object, str]] = deque()
        self._functions: set[FunctionType] = set()
        self._add(model, "")
        self._follow()
        for name, value in arguments.items():
            self._add(value, f"input {name}")
        self._follow()
        for _, hooks in _global_hooks():
            self._add(hooks, "hooks")
        self._follow()

    # -- following ---------------------------------------------------------------------------------

    def _follow(self) -> None:
        end = len(self._seen) + LIMIT
        while self._queue and len(self._seen) < end:
            self._open(*self._queue.popleft())
        self._queue.clear()

    def _add(self, value: object, name: str) -> None:
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            while name in self.tensors:
                name += "_"
            self.tensors[name] = value
        else:
            self._queue.append((value, name))

    def _open(self, value: object, name: str) -> None:
        """Remember an object, and follow what is in it."""
        if isinstance(value, dict | list | deque | set):
            kind = next(kind for kind in _CONTAINERS if isinstance(value, kind))
            self._keep(_CONTAINERS[kind](value), name)
            if type(value) not in _CONTAINERS and _is_open(value):
                self._keep(Attributes(value), name)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._add(item, _join(name, index))
        elif isinstance(value, CellType):
            self._keep(Cell(value), name)
        elif isinstance(value, FunctionType):
            self._function(value, name)
        elif isinstance(value, MethodType):
            self._add(value.__self__, name)
            self._add(value.__func__, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._add(part, name)
        elif Stream.holds(value):
            self._places.append(Stream(value))
        elif Array.holds(value):
            self._places.append(Array(value))
        elif _is_open(value):
            self._object(value, name)

    def _keep(self, place: Place, name: str) -> None:
        self._places.append(place)
        for key, item in place.items():
            self._add(item, _join(name, key))

    def _object(self, value: object, name: str) -> None:
        if isinstance(value, nn.Module):
            # Names of parameters and submodules do not say which dictionary they are in.
            for table in ("_parameters", "_buffers", "_modules"):
                self._add(value.__dict__.get(table), name)
            self._add(type(value).forward, name)
        self._keep(Attributes(value), name)

    def _function(self, function: FunctionType, name: str) -> None:
        """Follow the variables of a function: its defaults, its closure, the globals it names."""
        for part in (function.__defaults__, function.__kwdefaults__):
            self._add(part, name)
        for cell in function.__closure__ or ():
            self._add(cell, name)
        if function.__dict__:  # counters of a function; __wrapped__
            self._add(function.__dict__, name)
        if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            return
        place = Globals(function.__globals__, tuple(_names(function.__code__)))
        self._places.append(place)
        for key, item in place.items():
            if isinstance(item, dict | list | set | deque) or Stream.holds(item):
                self._add(item, str(key))
            elif isinstance(item, Tensor) and id(item) not in self._seen:
                self._seen[id(item)] = item
                self._places.append(Live(item))

    # -- exchanging --------------------------------------------------------------------------------

    def exchange(self, stand_ins: StandIns) -> None:
        """Put stand-ins into all places."""
        swap = self.swap(stand_ins)
        for place in self._places:
            place.exchange(swap)

    def swap(self, stand_ins: StandIns) -> Value:
        """What takes the place of a value: a stand-in, or a tuple or an iterator of its own."""
        return functools.partial(_swapped, stand_ins, {})

    def hide_backward_hooks(self) -> None:
        """Empty the modules' tables of hooks that see gradients."""
        modules = [m.__dict__ for m in self._seen.values() if isinstance(m, nn.Module)]
        for table in (*modules, {n.removeprefix("_global"): h for n, h in _global_hooks()}):
            for name in ("_backward_hooks", "_backward_pre_hooks"):
                table.get(name, {}).clear()

    def restore(self) -> None:
        """Put everything back as it was found."""
        for place in self._places:
            place.restore()


def _swapped(stand_ins: StandIns, memo: dict[int, Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        found = stand_ins.of(value)
        return value if found is None else found.value
    if not (isinstance(value, tuple) and value) and not isinstance(value, _ITERATORS):
        return value
    if id(value) not in memo:
        memo[id(value)] = _remade(stand_ins, memo, value)
    return memo[id(value)]


def _remade(stand_ins: StandIns, memo: dict[int, Any], value: Any) -> Any:
    if isinstance(value, tuple):
        items = [_swapped(stand_ins, memo, item) for item in value]
        same = all(a is b for a, b in zip(items, value, strict=True))
        return value if same else tuple.__new__(type(value), items)
    with warnings.catch_warnings():  # iterators will no longer be copyable in a later Python
        warnings.simplefilter("ignore")
        return copy.copy(value)


def _is_open(value: object) -> bool:
    if isinstance(value, (nn.Module, SimpleNamespace)):
        return True
    kind = type(value)
    package = kind.__module__
    if isinstance(value, (type, Enum)) or package.startswith(_OWN):
        return False
    return package.partition(".")[0] not in _CLOSED or package.startswith(_OPEN)


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _global_hooks() -> Iterator[tuple[str, dict[Any, Any]]]:
    module = torch.nn.modules.module
    for name, value in vars(module).items():
        if name.startswith("_global_") and isinstance(value, dict):
            yield name, value
