"""Whether Dynamo's bytecode around a graph does nothing but build what forward returns, and log.

The bytecode takes inputs out of the call, calls the graph and makes objects of its results: tuples,
named tuples, dataclasses, dictionaries. A print, a hook or a generator is another call in it.
"""

from __future__ import annotations

import collections
import dis
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, MethodType, ModuleType
from typing import Any

from torch.utils._pytree import is_structseq_class

from graphopt.capture.kept.logs import log_of

# Of existing lists, dictionaries and variables. Attributes of existing objects are looked at where
# Dynamo notes them (`checkpoints.Changes`), so these here are those of new ones.
_WRITES = frozenset({
    "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "STORE_SLICE",
    "DELETE_ATTR", "DELETE_SUBSCR", "DELETE_GLOBAL", "DELETE_DEREF",
})  # fmt: skip
_OTHER_CALLS = ("CALL_FUNCTION", "CALL_KW", "CALL_INTRINSIC", "KW_NAMES", "IMPORT", "SEND", "YIELD")
_BUILDERS = frozenset({
    "torch._dynamo.utils.record_pregraph_bytecode_enter",
    "torch._dynamo.utils.record_pregraph_bytecode_exit",
    "torch._dynamo.utils.object_setattr_ignore_descriptor",
    # Sizes that are inputs of the graph; that they are no results is counted in a run.
    "torch._dynamo.utils.call_size",
    "torch._dynamo.utils.call_stride",
    "torch._dynamo.utils.call_storage_offset",
    "builtins.object.__setattr__",
    "collections.OrderedDict",
    "type",
    # On values of the bytecode itself: it fills the dictionary of a new object.
    "?.clear", "?.items", "?.__setitem__",
})  # fmt: skip
_UNKNOWN = "?"
_OTHER = object()  # an argument that is no constant


@dataclass(frozen=True)
class _Constant:
    """A value that stands in the bytecode."""

    value: object


_MAKE = next(
    constant
    for constant in collections.namedtuple.__code__.co_consts
    if isinstance(constant, CodeType) and constant.co_name == "_make"
)
_KEEP = ("POP", "STORE", "RETURN", "NOP", "RESUME", "MAKE_CELL", "COPY_FREE", "END_FOR", "JUMP")


def logs_around(code: CodeType, graph: str, scope: Mapping[str, object]) -> list[list[Any]] | None:
    """What bytecode of Dynamo's logs, as data; ``None`` if it does more than build and log.

    Args:
        code: the bytecode.
        graph: the name of the global variable with the graph, which it has to call once.
        scope: global variables of the bytecode.
    """
    try:
        called = _called(code)
    except (IndexError, ValueError):  # of a Python whose bytecode is another one
        return None
    others = [(callee, args) for callee, args in called if callee != graph]
    if len(others) != len(called) - 1:
        return None
    others = [(callee, args) for callee, args in others if not _is_builder(callee, scope)]
    logs = [log_of(callee, args, scope) for callee, args in others if isinstance(callee, str)]
    found = [row for row in logs if row is not None]
    return found if len(found) == len(others) else None


def branches(code: CodeType) -> bool:
    """Whether steps of the bytecode may run more or less than once."""
    return any("JUMP" in s.opname or "ITER" in s.opname for s in dis.get_instructions(code))


def _is_builder(callee: object, scope: Mapping[str, object]) -> bool:
    if isinstance(callee, str):
        first, dot, rest = callee.partition(".")
        module = scope.get(first)
        name = f"{module.__name__}{dot}{rest}" if isinstance(module, ModuleType) else callee
        return name in _BUILDERS or name.endswith(".__new__")
    if isinstance(callee, MethodType):
        return getattr(callee.__func__, "__code__", None) == _MAKE
    return isinstance(callee, type) and is_structseq_class(callee)


def _called(code: CodeType) -> list[tuple[object, list[object]]]:
    """What each call of the bytecode calls, a constant or a name, and its constant arguments.

    Raises:
        ValueError: it is no such bytecode.
    """
    stack: list[object] = []
    variables: dict[str, object] = {}
    called: list[tuple[object, list[object]]] = []
    for step in dis.get_instructions(code):
        name = step.opname
        if name in _WRITES or name.startswith(_OTHER_CALLS):
            raise ValueError(name)
        if name == "CALL":
            assert step.arg is not None
            callee, bound = stack[-2 - step.arg], stack[-1 - step.arg]
            args = stack[len(stack) - step.arg :]
            known = [arg.value if isinstance(arg, _Constant) else _OTHER for arg in args]
            called.append((bound if callee is None else callee, known))
            del stack[-2 - step.arg :]
            stack.append(_UNKNOWN)
        else:
            _follow(step, stack, variables)
    return called


def _follow(step: dis.Instruction, stack: list[object], variables: dict[str, object]) -> None:
    """Carry out what an instruction does with names."""
    name, arg = step.opname, step.arg or 0
    if name.startswith(("LOAD_FAST", "STORE_FAST")):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        kinds = [part for part in name.split("_") if part in ("LOAD", "STORE")]
        for variable, kind in zip(names, kinds * len(names), strict=False):
            if kind == "STORE":
                variables[variable] = stack.pop()
            else:
                stack.append(variables.get(variable, variable))
    elif name == "LOAD_GLOBAL":
        null = [None] if arg & 1 else []
        stack += [step.argval, *null] if step.argrepr.endswith("+ NULL") else [*null, step.argval]
    elif name in ("LOAD_ATTR", "LOAD_METHOD"):
        base = stack.pop()
        stack.append(f"{base if isinstance(base, str) else _UNKNOWN}.{step.argval}")
        if name == "LOAD_METHOD" or "NULL" in step.argrepr:
            stack.append(base)
    elif name == "LOAD_CONST":
        stack.append(step.argval if callable(step.argval) else _Constant(step.argval))
    elif name == "PUSH_NULL":
        stack.append(None)
    elif name == "COPY":
        stack.append(stack[-arg])
    elif name == "SWAP":
        stack[-1], stack[-arg] = stack[-arg], stack[-1]
    else:
        _count(step, stack)


def _count(step: dis.Instruction, stack: list[object]) -> None:
    """Let the stack grow or shrink as an instruction does whose values have no names."""
    name = step.opname
    if name in ("PRECALL", "CACHE"):
        return
    if name == "JUMP_BACKWARD" and sys.version_info < (3, 12):  # behind a loop, its iterator goes
        change = -1
    elif name == "END_FOR":
        change = -1 if sys.version_info < (3, 13) else 0
    else:
        arg = step.arg if step.opcode >= dis.HAVE_ARGUMENT else None
        change = dis.stack_effect(step.opcode, arg, jump=False)
    if change < 0:
        del stack[change:]
    else:
        stack += [_UNKNOWN] * change
    if stack and not name.startswith(_KEEP):
        stack[-1] = _UNKNOWN
        if not name.startswith(("LOAD", "BUILD")) and change > 0:
            stack[-1 - change] = _UNKNOWN
