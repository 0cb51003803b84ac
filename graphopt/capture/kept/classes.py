"""Classes of what forward returns: known kinds, told by name and fields, and looked up by them.

Nothing is imported for a name of a file, and no code of a class runs: it is looked for in modules
that are there, and its objects are made as Dynamo's bytecode makes them, by `object.__new__` and
`object.__setattr__`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.utils._pytree import is_structseq_class

from graphopt.capture.kept.fingerprints import Fingerprints, Unkept
from graphopt.capture.kept.sources import Misfit, Unreadable

# What transformers keeps keys and values in, which its decoders return.
_CACHES = frozenset({"Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin"})


def kind_of(cls: type) -> str | None:
    """The kind of a class of which objects can be rebuilt; ``None`` where they cannot."""
    if is_structseq_class(cls):
        return "structure" if cls.__module__ == "torch.return_types" else None
    if issubclass(cls, tuple):
        return "namedtuple" if _is_namedtuple(cls) else None
    if hasattr(cls, "__del__"):
        return None
    if dataclasses.is_dataclass(cls):
        return "dataclass"
    return "cache" if any(map(_is_cache, cls.__mro__)) else None


def _is_namedtuple(cls: type) -> bool:
    fields = getattr(cls, "_fields", None)
    return type(fields) is tuple and all(type(field) is str for field in fields)


def _is_cache(cls: type) -> bool:
    return cls.__module__ == "transformers.cache_utils" and cls.__name__ in _CACHES


def fields_of(cls: type) -> list[str] | None:
    """The fields of a class of one of the known kinds, in order; a cache declares none."""
    if is_structseq_class(cls):
        return list(cls.__match_args__)  # type: ignore[attr-defined]
    if issubclass(cls, tuple):
        return list(cls._fields)  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return None


def base_of(cls: type) -> type:
    """The class of Python's own whose `__new__` makes its objects."""
    bases = (collections.OrderedDict, dict, tuple, object)
    return next(base for base in bases if issubclass(cls, base))


def attributes_of(value: object) -> dict[str, object]:
    """What stands in an object, in order; what its class says of its attributes does not count."""
    found = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        for name, slot in vars(cls).items():
            if isinstance(slot, types.MemberDescriptorType) and name not in found:
                with contextlib.suppress(AttributeError):  # nothing was assigned
                    found[name] = slot.__get__(value)
    return found


def is_attribute(cls: type, name: object) -> bool:
    """Whether objects of a class may have an attribute that is no more than a value."""
    if type(name) is not str or not name.isidentifier():
        return False
    fields = fields_of(cls)
    here = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    computed = hasattr(type(here), "__set__") and not isinstance(here, types.MemberDescriptorType)
    return (fields is None or name in fields) and not computed


def row_of(cls: type, of: Fingerprints) -> list[Any]:
    """A class as data.

    Raises:
        Unkept: it is of no known kind, or cannot be found by its name.
    """
    if kind_of(cls) is None:
        raise Unkept(f"forward returns an object of class {cls.__qualname__}")
    if found(cls.__module__, cls.__qualname__) is not cls:
        raise Unkept(f"forward returns an object of {cls.__qualname__}, which is in no module")
    return [cls.__module__, cls.__qualname__, fields_of(cls), of.value(cls)]


def found(module: str, name: str) -> object:
    """What stands under a name in a module that was imported; ``None`` where nothing does."""
    at: object = sys.modules.get(module)
    if not isinstance(at, types.ModuleType):
        return None
    for part in name.split("."):
        # Not `getattr`: a module may import what it is asked for.
        own = object.__getattribute__(at, "__dict__") if at is not None else {}
        at = own.get(part)
        if not isinstance(at, type):
            return None
    return at


def read_classes(rows: object, of: Fingerprints) -> list[type]:
    """The classes of a table, as they are in this process.

    Raises:
        Misfit: one has changed.
        Unreadable: it is no such table.
    """
    if not isinstance(rows, list):
        raise Unreadable("it has no classes")
    return [_read(row, of) for row in rows]


def _read(row: Any, of: Fingerprints) -> type:
    if not isinstance(row, list) or len(row) != 4:
        raise Unreadable("a class that cannot be read")
    module, name, fields, told = row
    if type(module) is not str or type(name) is not str:
        raise Unreadable("a class without a name")
    cls = found(module, name)
    if not isinstance(cls, type) or kind_of(cls) is None:
        raise Unreadable(f"{module}.{name} is no class of results")
    if of.value(cls) != told:
        raise Misfit(f"{module}.{name} has changed")
    if fields != fields_of(cls):
        raise Unreadable(f"{module}.{name} has other fields")
    return cls


def tuple_maker(cls: type) -> Callable[[Iterable[object]], object]:
    """What makes a named tuple, or one of `torch.return_types`, of its items."""
    if is_structseq_class(cls):
        return lambda items: cls(tuple(items))
    return lambda items: tuple.__new__(cls, tuple(items))


def object_maker(
    cls: type, names: Sequence[str], items: Sequence[str]
) -> Callable[[Sequence[object]], object]:
    """What makes an object of the values of its attributes.

    Args:
        cls: its class.
        names: of the attributes, in order.
        items: those that are items of it as well, which is a dictionary then, in order.
    """
    base: Any = base_of(cls)

    def make(values: Sequence[object]) -> object:
        made = base.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(made, name, value)
        if items:
            at = dict(zip(names, values, strict=True))
            for name in items:
                base.__setitem__(made, name, at[name])
        return made

    return make
