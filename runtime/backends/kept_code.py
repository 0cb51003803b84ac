"""The code of the eager backend as data, and executables of it in another process.

One line for each operator: its name, and its arguments, which are numbers, words and earlier
values. What is read is made into a function only if every operator is one that a text may call, or
the form of such a one that writes in place, and takes these arguments. No text of it becomes code:
names of values are numbers, and words are looked up among torch's own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.runtime.backends.calls import bind
from graphopt.runtime.engine.step import Executable
from graphopt.text.elements import elements_of, inlined, restored
from graphopt.text.names import name_of, operator_of
from graphopt.text.operators import is_allowed, misfit, names_no_mathematics
from graphopt.text.syntax import TensorType


class Untold(Exception):
    """Code holds something that is no data, for this reason."""


class Unreadable(Exception):
    """Data that is no code."""


_WORDS = (torch.dtype, torch.layout, torch.memory_format)
_PLAIN = (type(None), bool, int, float, str)
_MOST = 1 << 16  # inputs
_MOST_ELEMENTS = 1 << 14  # of a constant: a mask, or positions
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1


# -- writing ---------------------------------------------------------------------------------------


def code_data(graph: fx.Graph, owner: torch.nn.Module) -> dict[str, Any]:
    """A graph as data, as it is.

    Args:
        graph: of operators on tensors.
        owner: has its constants.

    Raises:
        Untold: there is something else in it.
    """
    values: dict[fx.Node, dict[str, int]] = {}
    operators: dict[str, int] = {}
    lines: list[list[Any]] = []
    constants: list[dict[str, Any]] = []
    returned: Any = None
    inputs = 0

    def argument(value: object) -> Any:
        if isinstance(value, fx.Node):
            return values[value]
        if type(value) in _PLAIN:
            return value
        if isinstance(value, list | tuple):
            return [argument(item) for item in value]
        if isinstance(value, _WORDS):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        raise Untold(f"an operator has an argument of type {type(value).__name__}")

    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = {"v": inputs}
            inputs += 1
        elif node.op == "get_attr":
            values[node] = {"c": len(constants)}
            constants.append(_constant(getattr(owner, str(node.target), None)))
        elif node.op == "output":
            returned = [argument(value) for value in node.args[0]]
        else:
            name = name_of(node.target)
            if name is None or node.op != "call_function":
                raise Untold(f"there is no name for {node.target}")
            values[node] = {"v": inputs + len(lines)}
            row = [operators.setdefault(name, len(operators)), argument(node.args)]
            if node.kwargs:
                row.append({key: argument(value) for key, value in node.kwargs.items()})
            lines.append(row)
    return {
        "inputs": inputs,
        "constants": constants,
        "operators": list(operators),
        "lines": lines,
        "returns": returned,
    }


def _constant(value: object) -> dict[str, Any]:
    if not isinstance(value, Tensor) or inlined(value, _MOST_ELEMENTS) is None:
        raise Untold("it holds a constant that is large, or no plain tensor")
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "bytes": elements_of(value).hex(),
    }


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """An executable, and how many arguments and results it has."""

    run: Executable
    inputs: int
    results: int


def code_of(data: Any) -> Code:
    """The executable that data is about.

    Raises:
        Unreadable: it is not what `code_data` makes.
    """
    try:
        return _Reader(data).code()
    except Unreadable:
        raise
    except Exception as error:  # what was edited by hand fails anywhere
        raise Unreadable(f"{type(error).__name__}: {error}") from error


@dataclass
class _Reader:
    data: Any
    bound: dict[str, Any] = field(default_factory=lambda: {"inf": math.inf, "nan": math.nan})
    words: dict[Any, str] = field(default_factory=dict)
    known: int = 0

    def code(self) -> Code:
        inputs, lines, returned = (self.data[name] for name in ("inputs", "lines", "returns"))
        if type(inputs) is not int or not isinstance(lines, list) or not isinstance(returned, list):
            raise Unreadable("it has no lines")
        if not 0 <= inputs <= _MOST:
            raise Unreadable("it has no such inputs")
        for number, constant in enumerate(self.data["constants"]):
            self.bound[f"c{number}"] = _tensor(constant)
        calls = [self._operator(name) for name in self.data["operators"]]
        self.known = inputs
        last: list[int] = [-1] * inputs
        texts = [self._line(row, calls, last) for row in lines]
        results = self._arguments(returned, last, len(texts))
        names = [f"v{i}" for i in range(inputs)]
        source = ["def run(values):"]
        if names:
            source.append(f" [{', '.join(names)}] = values")
        source.append(" values.clear()")
        ends: list[list[str]] = [[] for _ in range(len(texts) + 1)]
        for value, line in enumerate(last):
            ends[max(line, value - inputs, 0)].append(f"v{value}")
        for line, text in enumerate(texts):
            # Values die where they are read last, as in eager.
            dead = f"; {' = '.join(ends[line])} = None" if ends[line] else ""
            source.append(f" v{inputs + line} = {text}{dead}")
        source.append(f" return ({results}{',' if len(returned) == 1 else ''})")
        exec(compile("\n".join(source), f"<graphopt {id(self)}>", "exec"), self.bound)
        function = self.bound["run"]

        def run(arguments: list[Any]) -> Sequence[Any]:
            # A mode of the user has done its part while the call was captured.
            with torch._C.DisableTorchFunction():
                return function(arguments)  # type: ignore[no-any-return]

        return Code(run, inputs, len(returned))

    def _operator(self, name: object) -> tuple[Any, str]:
        target = operator_of(name) if isinstance(name, str) else None
        if target is operator.getitem:
            return target, ""
        if not isinstance(target, torch._ops.OpOverload) or not _may_call(target):
            raise Unreadable(f"code may not call {name!r:.60}")
        return target, bind(str(target), self.bound)

    def _line(self, row: Any, calls: Sequence[tuple[Any, str]], last: list[int]) -> str:
        index, arguments, *rest = row
        named = rest[0] if rest else {}
        if type(index) is not int or not 0 <= index < len(calls) or not isinstance(arguments, list):
            raise Unreadable("a line calls nothing")
        target, called = calls[index]
        at = len(last) - self.data["inputs"]
        if target is operator.getitem:
            value, place = arguments
            if named or type(place) is not int or not isinstance(value, dict):
                raise Unreadable("a line takes nothing of something")
            text = f"{self._argument(value, last, at)}[{place}]"
        else:
            given = {key: _example(value) for key, value in named.items()}
            if wrong := misfit(target, [_example(value) for value in arguments], given):
                raise Unreadable(f"{target}: {wrong}")
            parts = [self._argument(value, last, at) for value in arguments]
            parts += [f"{key}={self._argument(value, last, at)}" for key, value in named.items()]
            text = f"{called}{', '.join(parts)})"
        last.append(-1)
        self.known += 1
        return text

    def _arguments(self, values: list[Any], last: list[int], at: int) -> str:
        return ", ".join([self._argument(value, last, at) for value in values])

    def _argument(self, value: Any, last: list[int], at: int) -> str:
        kind = type(value)
        if kind is dict:
            ((what, which),) = value.items()
            if what == "v" and type(which) is int and 0 <= which < self.known:
                last[which] = at
                return f"v{which}"
            if what == "c" and type(which) is int and f"c{which}" in self.bound:
                return f"c{which}"
            return self._word(what, which)
        if kind is list:
            return f"[{self._arguments(value, last, at)}]"
        if kind is str:
            return self._name(value)
        if kind not in _PLAIN or (kind is int and not _SMALLEST <= value <= _LARGEST):
            raise Unreadable("an argument that there is not")
        return repr(value)

    def _word(self, what: object, which: object) -> str:
        if (what, which) not in self.words:
            found = _looked_up(what, which)
            self.words[what, which] = self._name(found)
        return self.words[what, which]

    def _name(self, value: object) -> str:
        name = f"w{len(self.bound)}"
        self.bound[name] = value
        return name


_ANY = torch.empty(0)  # stands for a value where arguments are compared with a schema


def _example(value: Any) -> Any:
    if type(value) is dict:
        ((what, which),) = value.items()
        return _ANY if what in ("v", "c") else _looked_up(what, which)
    return [_example(item) for item in value] if type(value) is list else value


@cache
def _looked_up(what: object, which: object) -> object:
    if what == "device" and isinstance(which, str):
        return torch.device(which)
    found = getattr(torch, which, None) if what == "torch" and isinstance(which, str) else None
    if not isinstance(found, _WORDS):
        raise Unreadable(f"there is no {which!r:.60}")
    return found


def _tensor(data: Any) -> Tensor:
    dtype = _looked_up("torch", data["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise Unreadable("a constant of no type")
    shape, stride = tuple(data["shape"]), tuple(data["stride"])
    if len(shape) != len(stride) or math.prod(shape) > _MOST_ELEMENTS:
        raise Unreadable("a constant that is none")
    kind = TensorType(dtype, shape, stride, torch.device("cpu"))
    return restored(kind, bytes.fromhex(data["bytes"]))


@cache
def _may_call(target: torch._ops.OpOverload) -> bool:
    """Whether a text may call an operator, or it is a form of such a one that writes in place."""
    if is_allowed(target):
        return True
    namespace, _, name = target._schema.name.partition("::")
    in_place = name.endswith("_") and not name.endswith("__")
    writes = name.startswith("_foreach_") or any(a.is_out for a in target._schema.arguments)
    plain = name.removeprefix("_foreach_").removesuffix("_")
    return namespace == "aten" and (writes or in_place) and not names_no_mathematics(plain)
