"""Everything that forward can reach from a model and the arguments of a call, and how to undo it.

The user's own objects stay in their places: modules, containers and plain objects are remembered as
they are, their tensors are exchanged for stand-ins, and afterwards each is put back as it was.
Whatever path a forward takes to them (a closure, a bound method, a hook) leads to the stand-ins.

What only a class or a global name leads to is put back too, but its tensors are not exchanged:
compiled code may know them already.

Not reached are the insides of other packages' objects (datasets, tokenizers, loggers), classes and
global variables of installed packages, files, and generators.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graphopt.model.copies import StandIns
from graphopt.model.iterators import copy_of_iterator, is_iterator
from graphopt.model.owners import home_of, is_library, is_open, is_users, is_users_class
from graphopt.model.places import Attributes, Cell, Deque, Dict, List, Place, Set, Value
from graphopt.model.values import Array, Class, Globals, Live, Stream

# A model that holds more objects than this is followed no further.
LIMIT = 200_000

_ATOMS = frozenset(
    {int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size}
)
_CONTAINERS: dict[type, Callable[[Any], Place]] = {dict: Dict, list: List, deque: Deque, set: Set}


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
        # What classes and global names lead to, opened last: another path may lead there as well.
        self._later: deque[tuple[object, str]] = deque()
        self._live = False
        self._named: set[tuple[int, tuple[str, ...]]] = set()
        self._add(model, "")
        self._follow()
        for name, value in arguments.items():
            self._add(value, f"input {name}")
        self._follow()
        for _, hooks in _global_hooks():
            self._add(hooks, "hooks")
        self._follow()
        self._live = True
        while self._later and len(self._seen) < LIMIT:
            self._add(*self._later.popleft())
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
        if isinstance(value, Tensor) and self._live:
            if not is_lazy(value):
                self._places.append(Live(value))
        elif isinstance(value, Tensor):
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
            if type(value) not in _CONTAINERS and is_open(value):
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
        elif isinstance(value, type):
            if is_users_class(value):
                self._class(value, name)
        elif Stream.holds(value):
            self._places.append(Stream(value))
        elif Array.holds(value):
            self._places.append(Array(value))
        elif is_open(value):
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
        self._later.append((type(value), type(value).__name__))

    def _class(self, kind: type, name: str) -> None:
        """Remember the attributes of a class, and follow them, its methods and its bases."""
        place = Class(kind)
        self._places.append(place)
        for base in kind.__bases__:
            self._later.append((base, base.__name__))
        for key, item in place.items():
            if isinstance(item, classmethod | staticmethod):
                item = item.__func__
            elif isinstance(item, property):
                item = item.fget
            self._later.append((item, _join(name, key)))

    def _function(self, function: FunctionType, name: str) -> None:
        """Follow the variables of a function: its defaults, its closure, the globals it names."""
        for part in (function.__defaults__, function.__kwdefaults__):
            self._add(part, name)
        for cell in function.__closure__ or ():
            self._add(cell, name)
        self._add(getattr(function, "__wrapped__", None), name)
        if not is_library(function.__module__):
            self._keep(Dict(vars(function)), name)
            self._globals(function.__globals__, tuple(_names(function.__code__)))

    def _globals(self, variables: dict[str, Any], names: tuple[str, ...]) -> None:
        """Follow those global variables of a module that a function may name."""
        if (id(variables), names) in self._named:
            return
        self._named.add((id(variables), names))
        place = Globals(variables, names)
        self._places.append(place)
        for key, item in place.items():
            if isinstance(item, dict | list | set | deque) or Stream.holds(item):
                self._add(item, str(key))
            elif isinstance(item, ModuleType):
                if is_users(item.__name__):  # `module.name` has `name` among the names, too
                    self._globals(vars(item), names)
            elif _is_users(item):
                self._later.append((item, str(key)))

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
    if is_iterator(value):
        return copy_of_iterator(value, memo)
    if not (isinstance(value, tuple) and value):
        return value
    if id(value) not in memo:
        memo[id(value)] = _remade(stand_ins, memo, value)
    return memo[id(value)]


def _remade(stand_ins: StandIns, memo: dict[int, Any], value: Any) -> Any:
    items = [_swapped(stand_ins, memo, item) for item in value]
    same = all(a is b for a, b in zip(items, value, strict=True))
    return value if same else tuple.__new__(type(value), items)


def _is_users(value: object) -> bool:
    """Whether a global variable is followed: not the names of other packages."""
    if isinstance(value, type):
        return is_users_class(value)
    if isinstance(value, FunctionType):
        return is_users(value.__module__)
    if isinstance(value, Tensor | nn.Module | functools.partial | MethodType):
        return True
    return Array.holds(value) or (is_open(value) and is_users(home_of(type(value))))


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
