"""What a Python value is, said so that another process says the same of an equal one.

A capture depends on values that Dynamo has read, on the classes of objects and on the code of all
functions it went through. Each is told here by its contents: a function by its bytecode, constants,
lines, defaults and what it closes over, a class by everything in it and in its bases.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# What is in every class, or changes without meaning anything.
_PASSED = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__",
    "_abc_impl", "__slotnames__", "__parameters__", "__orig_bases__", "__firstlineno__",
})  # fmt: skip
# What makes a field of a dataclass another one.
_OF_FIELD = ("name", "default", "default_factory", "init", "repr", "hash", "compare", "kw_only")
# The module that `collections.namedtuple` says functions are from that it makes.
NAMED_TUPLE = "namedtuple_"
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_OF_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_NATIVE = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.MethodWrapperType, types.ClassMethodDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType,
)  # fmt: skip


Form: TypeAlias = Sequence[int | None]
"""Sizes or strides, ``None`` for those that vary."""


class Unkept(Exception):
    """A capture is not one that can be kept, for this reason."""


class Fingerprints:
    """Fingerprints of the values of one call.

    Attributes:
        codes: of all functions that were met so far, and of those that are made in them.
    """

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()
        self._code: dict[CodeType, str] = {}
        self._class: dict[type, str] = {}
        self._open: set[int] = set()
        self._alive: list[object] = []

    def value(self, value: object) -> str:
        """Of a value that Dynamo has taken for a constant.

        Raises:
            Unkept: what it holds cannot be told.
        """
        found = self._told(value)
        if found is None:
            kind = type(value)
            raise Unkept(f"it depends on a {kind.__module__}.{kind.__qualname__}")
        return found

    def kind(self, value: object) -> str:
        """Of the class of a value, by what is in it."""
        return self._of_class(type(value))

    def tensor(self, value: object, size: Form | None = None, stride: Form | None = None) -> str:
        """Of everything but the elements of a tensor.

        Args:
            value: the tensor.
            size: where sizes are ``None`` that are left out; by default none is.
            stride: the same of strides.

        Raises:
            Unkept: it is not a plain one.
        """
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            raise Unkept(f"it depends on a {type(value).__qualname__}")
        assert isinstance(value, Tensor)
        if any(name.startswith("_dynamo") and name.endswith("_indices") for name in vars(value)):
            raise Unkept("sizes of a tensor are marked")
        if value.layout is not torch.strided or value.is_quantized:
            raise Unkept(f"it depends on a tensor with layout {value.layout}")
        return digest([
            type(value).__qualname__, value.dtype, value.device, _of_form(value.shape, size),
            _of_form(value.stride(), stride), value.requires_grad, value.is_leaf,
            value.is_inference(), torch._C._dispatch_keys(value),
        ])  # fmt: skip

    def code(self, code: CodeType) -> str:
        """Of bytecode, with its lines and constants."""
        self.codes.add(code)
        if code not in self._code:
            self._code[code] = digest([
                code.co_filename, code.co_qualname, code.co_firstlineno, code.co_flags,
                code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_names,
                code.co_varnames, code.co_freevars, code.co_cellvars, code.co_code.hex(),
                code.co_linetable.hex(), code.co_exceptiontable.hex(),
                *map(self._constant, code.co_consts),
            ])  # fmt: skip
        else:  # constants of equal code are other objects
            for constant in code.co_consts:
                if isinstance(constant, CodeType):
                    self.code(constant)
        return self._code[code]

    def _constant(self, value: object) -> str:
        if isinstance(value, CodeType):
            return self.code(value)
        if isinstance(value, frozenset):
            return str(sorted(map(self._constant, value)))
        if isinstance(value, tuple):
            return f"({','.join(map(self._constant, value))})"
        return f"{type(value).__name__} {value!r}"

    def _told(self, value: object) -> str | None:
        """Of a value, or nothing where it cannot be told what it holds."""
        if isinstance(value, enum.Enum):
            return digest([self._of_class(type(value)), value.name])
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if type(value) in _OF_TORCH:
            return f"{type(value).__name__} {value}"
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, CodeType):
            return self.code(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__} {getattr(value, '__file__', '')}"
        if isinstance(value, _NATIVE):
            owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
            at = owner.__qualname__ if isinstance(owner, type) else type(owner).__qualname__
            return f"native {getattr(value, '__module__', '')} {at} {value.__qualname__}"
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            return self._of_parts(value)
        finally:
            self._open.discard(id(value))

    def _of_parts(self, value: Any) -> str | None:
        if isinstance(value, types.FunctionType):
            if getattr(value, "_dynamo_marked_constant", False):
                return None
            cells = [_contents(cell) for cell in value.__closure__ or ()]
            # What a function closes over has conditions of its own where it is read.
            given = (value.__defaults__ or (), sorted((value.__kwdefaults__ or {}).items()))
            parts = [self.code(value.__code__), *map(self._loose, (*given, *cells))]
            if str(value.__globals__.get("__name__")).startswith(NAMED_TUPLE):
                parts.append(self._loose(value.__globals__.get("_tuple_new")))
            return digest([value.__module__, value.__qualname__, *parts])
        if isinstance(value, types.MethodType):
            return self._all([value.__func__, type(value.__self__)])
        if isinstance(value, staticmethod | classmethod):
            return self._all([type(value).__name__, value.__func__])
        if isinstance(value, property):
            return self._all(["property", value.fget, value.fset, value.fdel])
        if isinstance(value, dataclasses.Field):
            return digest(self._loose(getattr(value, name)) for name in _OF_FIELD)
        if isinstance(value, functools.partial):
            return self._all(["partial", value.func, value.args, value.keywords])
        if type(value) in (torch._ops.OpOverload, torch._ops.OpOverloadPacket):
            return f"operator {value}"
        if (wrapped := getattr(type(value), "__wrapped__", None) or _wrapped(value)) is not None:
            return self._all([type(value).__qualname__, wrapped])
        if type(value) in (tuple, list):
            return self._all([type(value).__name__, *value])
        if type(value) in (set, frozenset):
            told = [self._told(item) for item in value]
            return None if None in told else digest([type(value).__name__, *sorted(map(str, told))])
        if type(value) is dict:
            return self._all(["dict", *(part for pair in value.items() for part in pair)])
        return None

    def _all(self, values: Iterable[object]) -> str | None:
        told = [self._told(value) for value in values]
        return None if None in told else digest(told)

    def _loose(self, value: object) -> str:
        """Of a value by what it holds, or else by its class."""
        if isinstance(value, Tensor | nn.Module):
            return type(value).__qualname__
        told = self._told(value)
        return (
            told if told is not None else f"a {type(value).__module__}.{type(value).__qualname__}"
        )

    def _of_class(self, kind: type) -> str:
        if kind not in self._class:
            self._class[kind] = f"{kind.__module__}.{kind.__qualname__}"  # within itself
            parts = [f"{kind.__module__}.{kind.__qualname__}"]
            for base in kind.__mro__:
                if base.__module__ == "builtins":
                    parts.append(base.__qualname__)
                elif base is not kind:
                    parts.append(self._of_class(base))
            if kind.__module__ != "builtins":
                named = sorted((n, v) for n, v in vars(kind).items() if n not in _PASSED)
                parts += [f"{name} {self._loose(value)}" for name, value in named]
            self._class[kind] = digest(parts)
        return self._class[kind]


def _of_form(numbers: Sequence[int], form: Form | None) -> tuple[int | None, ...]:
    if form is None:
        return tuple(numbers)
    pairs = zip(numbers, form, strict=True)
    return tuple(None if left_out is None else number for number, left_out in pairs)


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _wrapped(value: object) -> object:
    return getattr(value, "__wrapped__", None) if callable(value) else None


def digest(parts: Iterable[object]) -> str:
    """One short text for several."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]
