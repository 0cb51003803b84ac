"""Where Dynamo has found a value, as data and back: ``L['self']._modules['fc'].weight``.

Places are steps from the variables of a call (``L``) and those of its module (``G``). What comes
from a file is made of the steps listed here and of names, so that reading a value cannot do more
than look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._dynamo import source as of_dynamo
from torch._dynamo.source import TensorProperty
from torch._guards import Source

from graphopt.capture.kept.fingerprints import Unkept


class Misfit(Exception):
    """What is kept is not for this call."""


class Unreadable(Misfit):
    """It is not what was written."""


BUILTINS = "__builtins_dict__"

_NAMES: dict[str, tuple[str, ...]] = {
    "LocalSource": ("local_name", "is_input", "is_derefed_cell_contents"),
    "GlobalSource": ("global_name",),
    "AttrSource": ("member",),
    "GenericAttrSource": ("member",),
    "UnspecializedParamBufferSource": ("member",),
    "ParamBufferSource": ("member",),
    "DictGetItemSource": ("index",),
    "DictSubclassGetItemSource": ("index",),
    "GetItemSource": ("index",),
    "ListGetItemSource": ("index",),
    "ConstDictKeySource": ("index",),
    "DefaultsSource": ("idx_key", "is_kw"),
    "CellContentsSource": ("member", "freevar_name"),
    "NNModuleSource": (),
    "UnspecializedNNModuleSource": (),
    "UnspecializedBuiltinNNModuleSource": (),
    "TypeSource": (),
    "TypeDictSource": (),
    "TypeMROSource": (),
    "CodeSource": (),
    "ClosureSource": (),
    "GlobalStateSource": (),
    "TensorPropertySource": ("prop", "idx"),
}
_PROPERTIES = {p.method_name(): p for p in TensorProperty}
# Of tensors alone: an object may have a method of such a name that does something.
_OF_TENSORS = {name: getattr(Tensor, name) for name in _PROPERTIES}
# Where an index may be a place itself.
_KEYED = ("DictGetItemSource", "DictSubclassGetItemSource")
_IDENTIFIERS = ("member", "local_name", "global_name", "freevar_name")
_ROOTS = ("LocalSource", "GlobalSource", "GlobalStateSource")

# How each step is written; what it starts from is the first of its parts.
_STEPS: dict[str, str] = {
    "AttrSource": "{0}.{1}",
    "GenericAttrSource": "object.__getattribute__({0}, {1!r})",
    "UnspecializedParamBufferSource": "{0}.{1}",
    "ParamBufferSource": "{0}.{1}",
    "CellContentsSource": "{0}.{1}",
    "DictGetItemSource": "{0}[{1!r}]",
    "DictSubclassGetItemSource": "dict.__getitem__({0}, {1!r})",
    "GetItemSource": "{0}[{1!r}]",
    "ListGetItemSource": "list.__getitem__({0}, {1!r})",
    "ConstDictKeySource": "list(dict.keys({0}))[{1!r}]",
    "NNModuleSource": "{0}",
    "UnspecializedNNModuleSource": "{0}",
    "UnspecializedBuiltinNNModuleSource": "{0}",
    "TypeSource": "type({0})",
    "TypeDictSource": "{0}.__dict__",
    "TypeMROSource": "{0}.__mro__",
    "CodeSource": "{0}.__code__",
    "ClosureSource": "{0}.__closure__",
}


class Writer:
    """Sources as rows of a table, each the kind of a step, where it starts and its names."""

    def __init__(self, builtins: str | None) -> None:
        self.rows: list[list[Any]] = []
        self._builtins = builtins
        self._at: dict[Source, int] = {}

    def add(self, source: Source) -> int:
        """The row of a source.

        Raises:
            Unkept: it has a step that is not known here.
        """
        if source not in self._at:
            row = self._row(source)
            self._at[source] = len(self.rows)
            self.rows.append(row)
        return self._at[source]

    def _row(self, source: Source) -> list[Any]:
        kind = type(source).__name__
        names = _NAMES.get(kind)
        if names is None or getattr(of_dynamo, kind, None) is not type(source):
            raise Unkept(f"it depends on {source.name}")
        row: list[Any] = [kind, None if kind in _ROOTS else self.add(source.base)]  # type: ignore[attr-defined]
        for name in names:
            value = getattr(source, name)
            if isinstance(value, Source):
                value = {"at": self.add(value)}
            if isinstance(value, TensorProperty):
                value = value.method_name()
            if not _sound(name, value, kind):
                raise Unkept(f"it depends on {source.name}")
            row.append(BUILTINS if kind == "GlobalSource" and value == self._builtins else value)
        left = {f.name for f in dataclasses.fields(source) if f.init} - {*names, "base"}
        if any(getattr(source, name) for name in left - {"is_varargs", "is_varkw"}):
            raise Unkept(f"it depends on {source.name}")
        if any(getattr(source, name, False) for name in ("is_varargs", "is_varkw")):
            row.append("is_varargs" if source.is_varargs else "is_varkw")  # type: ignore[attr-defined]
        return row


def _sound(name: str, value: object, kind: str) -> bool:
    if name in _IDENTIFIERS:
        return type(value) is str and (
            value.isidentifier() or (name, value) == ("freevar_name", "")
        )
    if name.startswith("is_"):
        return type(value) is bool
    if isinstance(value, dict):
        return kind in _KEYED and list(value) == ["at"] and type(value["at"]) is int
    if name == "idx_key" and type(value) is str:
        return value.isidentifier()
    if name == "prop":
        return type(value) is str and value in _PROPERTIES
    if name == "idx":
        return value is None or (type(value) is int and value >= 0)
    return type(value) in (int, str)


def read_sources(rows: object, builtins: str) -> list[Source]:
    """The sources of a table.

    Args:
        rows: as `Writer` has made them, or anything else.
        builtins: the name of the global variable that has Python's builtins.

    Raises:
        Unreadable: it is no such table.
    """
    if not isinstance(rows, list):
        raise Unreadable("no table of places")
    made: list[Source] = []
    for row in rows:
        made.append(_source(row, made, builtins))
    return made


def _source(row: Any, made: Sequence[Source], builtins: str) -> Source:
    if not isinstance(row, list) or len(row) < 2 or row[0] not in _NAMES:
        raise Unreadable("a place of an unknown kind")
    kind, base, *values = row
    names = _NAMES[kind]
    flags = {values.pop(): True} if len(values) == len(names) + 1 else {}
    if len(values) != len(names) or not flags.keys() <= {"is_varargs", "is_varkw"}:
        raise Unreadable(f"a place of kind {kind} has other parts")
    given: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if not _sound(name, value, kind):
            raise Unreadable(f"a place of kind {kind} has other parts")
        given[name] = _at(made, value["at"]) if isinstance(value, dict) else value
    if kind == "GlobalSource" and given["global_name"] == BUILTINS:
        given["global_name"] = builtins
    if "prop" in given:
        given["prop"] = _PROPERTIES[given["prop"]]
    if kind not in _ROOTS:
        given["base"] = _at(made, base)
    try:
        return getattr(of_dynamo, kind)(**given, **flags)  # type: ignore[no-any-return]
    except (TypeError, AssertionError, ValueError) as error:
        raise Unreadable(f"a place of kind {kind}: {error}") from error


def _at(made: Sequence[Source], index: object) -> Source:
    if type(index) is not int or not 0 <= index < len(made):
        raise Unreadable("a place that starts nowhere")
    return made[index]


def reader(sources: Sequence[Source]) -> Callable[[Any, Any], tuple[Any, ...]]:
    """A function that reads the values of sources off variables ``(L, G)``."""
    lines: list[str] = []
    known: dict[Source, str] = {}

    def place(source: Source) -> str:
        if source not in known:
            written = _written(source, place)
            known[source] = f"v{len(known)}"
            lines.append(f"    {known[source]} = {written}\n")
        return known[source]

    wanted = [place(source) for source in sources]
    text = f"def read(L, G):\n{''.join(lines)}    return ({''.join(f'{v}, ' for v in wanted)})\n"
    scope: dict[str, Any] = dict(_OF_TENSORS)
    exec(compile(text, "<the inputs of a kept capture>", "exec"), scope)
    return scope["read"]  # type: ignore[no-any-return]


def _written(source: Any, place: Callable[[Source], str]) -> str:
    kind = type(source).__name__
    if kind == "LocalSource":
        return f"L[{source.local_name!r}]"
    if kind == "GlobalSource":
        return f"G[{source.global_name!r}]"
    base = place(source.base)
    if kind == "DefaultsSource":
        where = "__kwdefaults__" if source.is_kw else "__defaults__"
        return f"{base}.{where}[{source.idx_key!r}]"
    names = [getattr(source, name) for name in _NAMES[kind]]
    if kind == "TensorPropertySource":
        index = "" if source.idx is None else f", {source.idx}"
        return f"{source.prop.method_name()}({base}{index})"
    if names and isinstance(names[0], Source):
        return _STEPS[kind].replace("{1!r}", "{1}").format(base, place(names[0]))
    return _STEPS[kind].format(base, *names)
