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
from typing import Any

import torch
from torch import fx

from graphopt.runtime.backends.calls import bind
from graphopt.runtime.backends.kept_words import (
    PLAIN,
    Unreadable,
    Untold,
    callable_of,
    check_call,
    constant_data,
    line_of,
    looked_up,
    plain,
    tensor_of,
    word_data,
)
from graphopt.runtime.engine.step import Executable
from graphopt.text.names import name_of

_MOST = 1 << 16  # inputs


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
        if type(value) in PLAIN:
            return value
        if isinstance(value, list | tuple):
            return [argument(item) for item in value]
        return word_data(value)

    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = {"v": inputs}
            inputs += 1
        elif node.op == "get_attr":
            values[node] = {"c": len(constants)}
            constants.append(constant_data(getattr(owner, str(node.target), None)))
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
            self.bound[f"c{number}"] = tensor_of(constant)
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
        target = callable_of(name)
        return target, "" if target is operator.getitem else bind(str(target), self.bound)

    def _line(self, row: Any, calls: Sequence[tuple[Any, str]], last: list[int]) -> str:
        index, arguments, named = line_of(row, len(calls))
        target, called = calls[index]
        check_call(target, arguments, named)
        at = len(last) - self.data["inputs"]
        if target is operator.getitem:
            value, place = arguments
            text = f"{self._argument(value, last, at)}[{place}]"
        else:
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
        return repr(plain(value))

    def _word(self, what: object, which: object) -> str:
        if (what, which) not in self.words:
            found = looked_up(what, which)
            self.words[what, which] = self._name(found)
        return self.words[what, which]

    def _name(self, value: object) -> str:
        name = f"w{len(self.bound)}"
        self.bound[name] = value
        return name
