"""Dynamo's guards as data, and guards of the same kinds made of it in another process.

Each condition is kept with a fingerprint of what it is about. Another process looks at all of them
before a capture counts as one for its call; then Dynamo builds guards from the values that are
there, which are as strict as those of a new capture.
"""

from __future__ import annotations

import builtins
import functools
import os
import re
import sys
import traceback
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.guards import CheckFunctionManager, GuardBuilder
from torch._dynamo.output_graph import OutputGraphGuardsState
from torch._dynamo.source import ShapeEnvSource, is_from_skip_guard_source
from torch._dynamo.utils import get_metrics_context
from torch._guards import CompileContext, Guard, GuardsSet, Source, compile_context
from torch.utils.weak import TensorWeakRef

from graphopt.capture.kept.fingerprints import NAMED_TUPLE, Fingerprints, Unkept
from graphopt.capture.kept.library import library_of, same_library
from graphopt.capture.kept.sizes import Sizes, form_of
from graphopt.capture.kept.sources import BUILTINS, Misfit, Unreadable, Writer, read_sources, reader

# Of the state of the process, which is part of the key of a capture.
_GLOBAL = frozenset({
    "GLOBAL_STATE", "GRAD_MODE", "DEFAULT_DEVICE", "DETERMINISTIC_ALGORITHMS",
    "TORCH_FUNCTION_STATE", "AUTOGRAD_SAVED_TENSORS_HOOKS",
})  # fmt: skip
_WHOLE = frozenset({
    "CONSTANT_MATCH", "EQUALS_MATCH", "BUILTIN_MATCH", "CLOSURE_MATCH", "FUNCTION_MATCH",
    "CLASS_MATCH", "MODULE_MATCH", "ID_MATCH", "NONE_MATCH", "BOOL_MATCH",
})  # fmt: skip
_KINDS = _GLOBAL | _WHOLE | {
    "TYPE_MATCH", "TENSOR_MATCH", "DICT_KEYS_MATCH", "SEQUENCE_LENGTH", "NOT_NONE_MATCH",
    "EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT", "HASATTR", "DICT_CONTAINS",
    "DICT_NOT_CONTAINS", "DUPLICATE_INPUT",
}  # fmt: skip
# How Dynamo names what it puts into the global variables of forward.
_BY_ADDRESS = re.compile(r"\w*_\d+_c\d+")
_OPTIONS: dict[str, tuple[type, ...]] = {"attr": (str,), "key": (str, int), "invert": (bool,)}
_FORMS = ("size", "stride")  # of tensors of which some are symbols


def conditions_of(
    state: Any,
    variables: Mapping[str, Any],
    imports: Mapping[str, str],
    traced: Sequence[types.CodeType],
    writer: Writer,
    of: Fingerprints,
    *,
    symbolic: bool,
) -> dict[str, Any]:
    """All conditions of a capture as data, without the table of places that `writer` makes.

    Args:
        state: of Dynamo, with its guards.
        variables: of the captured call, local ones (``L``) and global ones (``G``).
        imports: modules that guards find under names of Dynamo's own.
        traced: the code that Dynamo went through.
        writer: of places.
        of: fingerprints; what was met is known, too.
        symbolic: whether sizes may be symbols, which have conditions of their own.

    Raises:
        Unkept: something that it depends on cannot be told.
    """
    if state.torch_function_mode_stack or state.functorch_layers or state.dual_level != -1:
        raise Unkept("it is called within a mode, or under a transform of torch.func")
    if state.current_device is not None:
        raise Unkept("there is a default device")
    asked = state.shape_env is None or (state.shape_env.guards and not symbolic)
    if state.aotautograd_guards or asked:
        raise Unkept("it has conditions on sizes")
    guards = sorted(
        guard
        for guard in state.guards
        if guard.create_fn_name() != "SHAPE_ENV"
        and not in_a_named_tuple(guard.originating_source, state.global_scope)
    )
    lines = [(guard, *written(guard, writer)) for guard in guards]
    sources = {g.originating_source: None for g in guards if g.create_fn_name() not in _GLOBAL}
    others = {g.create_fn.keywords["source_b"] for g in guards if _is_pair(g)}
    wanted = [*sources, *(others - sources.keys())]
    values = dict(zip(wanted, reader(wanted)(variables["L"], variables["G"]), strict=True))
    rows = []
    for guard, place, kind, options in lines:
        value = values.get(guard.originating_source)
        if kind == "TENSOR_MATCH" and symbolic:
            options |= forms(state.input_source_to_sizes_strides[guard.originating_source])
        if kind == "DUPLICATE_INPUT":
            told = str(value is values[guard.create_fn.keywords["source_b"]])
        else:
            told = fingerprint(kind, value, options, of)
        rows.append([place, kind, options, told, last_line(guard)])
    traced = [code for code in traced if not _of_torch(code)]
    library = library_of((code for code in traced if code not in of.codes), of)
    for code in traced:
        if code not in of.codes:
            raise Unkept(f"it goes through {code.co_qualname}, which no condition leads to")
    tensors = [values[g.originating_source] for g in guards if g.create_fn_name() == "TENSOR_MATCH"]
    return {
        "imports": {**imports, **_modules(writer, state.global_scope)},
        "library": library,
        "ordered": [
            writer.add(source)
            for source in state.guard_on_key_order
            if not is_from_skip_guard_source(source)  # on which there are no conditions
        ],
        "conditions": rows,
        "sharing": sharing(tensors),
    }


def forms(known: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Sizes and strides of a tensor without symbols, if some of them are symbols."""
    found = {name: form_of(known[name]) for name in _FORMS}
    return found if any(None in form for form in found.values()) else {}


def _modules(writer: Writer, scope: Mapping[str, Any]) -> dict[str, str]:
    """Modules among the global variables that Dynamo has named by an address.

    Raises:
        Unkept: another object is among them, which no other process finds.
    """
    names = [row[2] for row in writer.rows if row[0] == "GlobalSource"]
    found = {name: scope.get(name) for name in names if _BY_ADDRESS.fullmatch(name)}
    if not all(isinstance(value, types.ModuleType) for value in found.values()):
        raise Unkept("it depends on an object that is in no module")
    return {name: value.__name__ for name, value in found.items() if value is not None}


def in_a_named_tuple(source: Any, scope: Mapping[str, Any]) -> bool:
    """Whether a place is in the variables that `collections.namedtuple` gives to a class.

    They are in no module; what they hold is told with the class.
    """
    while hasattr(source, "base"):
        source = source.base
    found = scope.get(getattr(source, "global_name", ""))
    if not isinstance(found, dict) or not _BY_ADDRESS.fullmatch(source.global_name):
        return False
    return str(found.get("__name__")).startswith(NAMED_TUPLE)


def _is_pair(guard: Guard) -> bool:
    return guard.create_fn_name() == "DUPLICATE_INPUT"


def _of_torch(code: types.CodeType) -> bool:
    return code.co_filename.startswith(f"{next(iter(torch.__path__))}{os.sep}")


def written(guard: Guard, writer: Writer) -> tuple[int, str, dict[str, Any]]:
    """The place, the kind and the options of a guard.

    Raises:
        Unkept: it is of a kind that is not known here.
    """
    kind, name = guard.create_fn_name(), guard.originating_source.name
    if kind not in _KINDS:
        raise Unkept(f"{name or 'the process'} has a condition of kind {kind}")
    options: dict[str, Any] = {}
    made = guard.create_fn
    if isinstance(made, functools.partial):
        names = made.func.__code__.co_varnames[2:]
        given = dict(zip(names, made.args, strict=False)) | made.keywords
        for option, value in given.items():
            if isinstance(value, Source):
                options[option] = writer.add(value)
            elif option in _OPTIONS and isinstance(value, _OPTIONS[option]):
                options[option] = value
            elif option not in ("recompile_hint", "value"):
                raise Unkept(f"{name} has a condition with the option {option}")
    return writer.add(guard.originating_source), kind, options


def fingerprint(kind: str, value: Any, options: Mapping[str, Any], of: Fingerprints) -> str:
    """What a condition asks of a value, as far as another process has to find the same.

    Raises:
        Unkept: it cannot be told.
    """
    if kind in _GLOBAL:
        return ""
    if kind in _WHOLE:
        return of.value(value)
    if kind == "TYPE_MATCH":
        return of.kind(value)
    if kind == "TENSOR_MATCH":
        return of.tensor(value, *(options.get(name) for name in _FORMS))
    if kind == "DICT_KEYS_MATCH":
        return str([of.value(key) for key in dict.keys(value)])
    if kind in ("SEQUENCE_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"):
        return str(len(value))
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return str(options["attr"] in value.__dict__)
    if kind == "HASATTR":
        return str(hasattr(value, options["attr"]))
    if kind in ("DICT_CONTAINS", "DICT_NOT_CONTAINS"):
        return str(options["key"] in value)
    return str(value is not None)


def sharing(values: Sequence[object]) -> list[list[int]]:
    """For each tensor the first that is the same, and the first with the same memory."""
    first: dict[object, int] = {}
    found = []
    for index, value in enumerate(values):
        assert isinstance(value, torch.Tensor)
        memory = ("memory", value.untyped_storage()._cdata)
        found.append([first.setdefault(id(value), index), first.setdefault(memory, index)])
    return found


class Kept:
    """The conditions of a kept capture, read for one call.

    Args:
        data: as `conditions_of` has made it, or anything else.
        variables: of the call.
        scope: the global variables of forward.

    Raises:
        Misfit: they do not hold for the call, or are none.
    """

    def __init__(self, data: Any, variables: Mapping[str, Any], scope: dict[str, Any]) -> None:
        self.scope = scope
        self.variables = variables
        for alias, name in _named(data, "imports").items():
            module = sys.modules.get(name) if isinstance(name, str) else None
            if module is None or scope.setdefault(alias, module) is not module:
                raise Misfit(f"the module {name} is not there")
        self.builtins = _with_builtins(scope)
        self.sources = read_sources(data["places"], self.builtins)
        self._sharing = _listed(data, "sharing")
        rows = _rows(data)
        self._rows = {row[0]: row for row in rows if row[1] == "TENSOR_MATCH"}
        tensors = frozenset(self.source(place) for place in self._rows)
        self.sizes = Sizes(data["sizes"], self.source, tensors) if "sizes" in data else None
        wanted = list(dict.fromkeys(index for row in rows for index in _places(row)))
        wanted += self.sizes.places if self.sizes else ()
        try:
            values = reader([self.source(i) for i in wanted if not self._of_process(i)])(
                variables, scope
            )
        except Exception as error:  # whatever a step raises, it is not there
            raise Misfit(f"a value is not there: {error}") from error
        places = [i for i in wanted if not self._of_process(i)]
        self.values = dict(zip(places, values, strict=True))
        self._compare(rows, data.get("library"))
        if self.sizes:
            self.sizes.compare(self.values)
        self.guards = [self._guard(row[0], row[1], row[2], row[4]) for row in rows]
        self.ordered = {self.source(index) for index in _listed(data, "ordered")}

    def source(self, index: object) -> Source:
        """The place with this number."""
        if type(index) is not int or not 0 <= index < len(self.sources):
            raise Unreadable("a condition on nothing")
        return self.sources[index]

    def _of_process(self, index: int) -> bool:
        return type(self.source(index)).__name__ == "GlobalStateSource"

    def _compare(self, rows: Sequence[Sequence[Any]], library: object) -> None:
        of = Fingerprints()
        same_library(library, of)
        tensors = [self.values[row[0]] for row in rows if row[1] == "TENSOR_MATCH"]
        for place, kind, options, expected, _ in rows:
            value = self.values.get(place)
            try:
                if kind == "DUPLICATE_INPUT":
                    found = str(value is self.values[options["source_b"]])
                else:
                    found = fingerprint(kind, value, options, of)
            except Exception as error:
                raise Misfit(f"{self.source(place).name}: {error}") from error
            if found != expected:
                raise Misfit(f"{self.source(place).name} is another one ({kind})")
        if sharing(tensors) != self._sharing:
            raise Misfit("tensors are shared in another way")

    def _guard(self, place: int, kind: str, options: dict[str, Any], line: Any) -> Guard:
        made = getattr(GuardBuilder, kind)
        given = {name: value for name, value in options.items() if name not in _FORMS}
        if "source_b" in given:
            given["source_b"] = self.source(given["source_b"])
        if kind == "TENSOR_MATCH":
            given["value"] = TensorWeakRef(self.values[place])
        if given:
            made = functools.partial(made, **given)
        guard = Guard(self.source(place), made)
        if line:
            guard.user_stack = _stack(*line)
        return guard

    def manager(self, code: types.CodeType, owner: object) -> Any:
        """Dynamo's guards for calls like this one; `owner` needs Python's builtins found."""
        weakref.finalize(owner, self.scope.pop, self.builtins, None)
        known = {}
        for place, row in self._rows.items():
            value, options = self.values[place], row[2]
            whole = {"size": value.size(), "stride": value.stride()}
            known[self.source(place)] = {n: options.get(n, whole[n]) for n in _FORMS}
        guards, parts = list(self.guards), None
        if self.sizes:
            guards.append(Guard(ShapeEnvSource(), GuardBuilder.SHAPE_ENV))
            parts = self.sizes.guard()
        state = OutputGraphGuardsState(
            local_scope=dict(self.variables),
            global_scope=self.scope,
            torch_function_mode_stack=[],
            guard_on_key_order=self.ordered,
            input_source_to_sizes_strides=known,  # type: ignore[arg-type]
            dual_level=-1,
            functorch_layers=[],
            current_device=None,
            global_state_guard=torch._C._dynamo.guards.GlobalStateGuard(),
            name_of_builtins_dict_key_in_fglobals=self.builtins,
            _guards=GuardsSet(torch.utils._ordered_set.OrderedSet(guards)),
            _aotautograd_guards=[],
        )
        with get_metrics_context(), compile_context(CompileContext(None)):
            made = CheckFunctionManager(code, state, shape_code_parts=parts)  # type: ignore[arg-type]
            return made.guard_manager


@functools.lru_cache(maxsize=1024)
def _stack(file: str, number: int, name: str, line: str) -> traceback.StackSummary:
    return traceback.StackSummary.from_list([(file, number, name, line)])


def _named(data: Any, name: str) -> dict[str, Any]:
    found = data.get(name) if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise Unreadable(f"it has no {name}")
    return found


def _listed(data: Any, name: str) -> list[Any]:
    found = data.get(name)
    if not isinstance(found, list):
        raise Unreadable(f"it has no {name}")
    return found


def _rows(data: Any) -> list[Any]:
    rows = data.get("conditions")
    if not isinstance(rows, list) or not all(isinstance(r, list) and len(r) == 5 for r in rows):
        raise Unreadable("it has no conditions")
    for place, kind, options, expected, line in rows:
        sound = type(place) is int and kind in _KINDS and isinstance(options, dict)
        known = sound and all(_option(name, value, kind) for name, value in options.items())
        said = line is None or (
            isinstance(line, list) and [type(part) for part in line] == [str, int, str, str]
        )
        if not (sound and known and said and type(expected) is str):
            raise Unreadable("a condition that cannot be read")
    return rows


def _option(name: str, value: object, kind: str) -> bool:
    """Whether a condition of a kind may have an option."""
    if name in _FORMS:
        numbers = isinstance(value, list) and all(n is None or type(n) is int for n in value)
        return kind == "TENSOR_MATCH" and numbers
    return type(value) is int if name == "source_b" else isinstance(value, _OPTIONS.get(name, ()))


def _places(row: Sequence[Any]) -> list[int]:
    return [row[0], *([row[2]["source_b"]] if "source_b" in row[2] else [])]


def _with_builtins(scope: dict[str, Any]) -> str:
    """The name of a new global variable with Python's builtins, which guards look into."""
    number = 0
    while f"{BUILTINS}_kept_{number}" in scope:
        number += 1
    name = f"{BUILTINS}_kept_{number}"
    found = scope.get("__builtins__", builtins)
    scope[name] = found if isinstance(found, dict) else vars(found)
    return name


def last_line(guard: Guard) -> list[Any] | None:
    """The user's line that a condition on a value or a length comes from."""
    if guard.create_fn_name() not in (*_WHOLE, "SEQUENCE_LENGTH"):
        return None
    for frame in reversed(guard.user_stack or ()):
        if "/torch/" not in frame.filename:
            return [frame.filename, frame.lineno or 0, frame.name, frame.line or ""]
    return None
