"""`Program` to text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import EllipsisType

from graphopt.plan import Slot
from graphopt.text.header import FORMAT_VERSION
from graphopt.text.names import CPU, DTYPE_WORDS, word_of
from graphopt.text.sizes import Size, Symbol, write_size
from graphopt.text.syntax import (
    DEFAULT_FACTS,
    LAST_LINE,
    NONE,
    Body,
    Call,
    Constant,
    Input,
    Literal,
    OpName,
    Program,
    Ref,
    SizeType,
    Slice,
    Statement,
    SubGraph,
    Type,
    default_stride,
)

# -- the whole text --------------------------------------------------------------------------------


def write_program(program: Program) -> str:
    """The text of a program, ending in a newline."""
    lines = [f"gopt {FORMAT_VERSION} {program.level} torch {program.torch}"]
    if program.facts != DEFAULT_FACTS:
        lines.append(" ".join(["facts", *(json.dumps(f) for f in sorted(program.facts))]))
    lines += map(_symbol, program.symbols)
    section = ""
    for title, line in _titled_lines(program):
        if title != section:
            section = title
            lines += ["", title]
        lines.append(line)
    return "\n".join([*lines, "", LAST_LINE, ""])


def _symbol(symbol: Symbol) -> str:
    least = "" if symbol.least is None else f" from {symbol.least}"
    most = "" if symbol.most is None else f" to {symbol.most}"
    return f"symbol {symbol.name} = {symbol.hint}{least}{most}"


def _titled_lines(program: Program) -> Iterator[tuple[str, str]]:
    """Every line with the title of the section that it stands in."""
    for statement in program.statements:
        kind = " inputs" if isinstance(statement.what, Input) else ""
        for line in _statement(statement, "  "):
            yield f"{statement.phase}{kind}", line
    for slot, name in program.outputs:
        yield f"{slot.phase} outputs", f"  {write_output(slot, name)}"


def write_statement(statement: Statement) -> str:
    """The line of one value; of a sub-graph, only the first one."""
    return next(_statement(statement, ""))


def write_output(slot: Slot, name: str) -> str:
    """The line of one output, which returns the value `name`."""
    return f"{slot.role} {json.dumps(slot.name)} = %{name}"


def _statement(statement: Statement, indent: str) -> Iterator[str]:
    text = f"{indent}%{statement.name} = {_what(statement.what)}"
    if statement.type != NONE:
        text += f" : {write_type(statement.type)}"
    if isinstance(statement.what, Constant):
        text += _values(statement.what)
    if statement.module:
        bare = re.fullmatch(r"[\w.]+", statement.module)
        text += f" @{statement.module if bare else json.dumps(statement.module)}"
    if statement.recompute:
        region = "" if statement.region is None else f":{statement.region}"
        text += f" !{statement.recompute}{region}"
    body = statement.what.body if isinstance(statement.what, SubGraph) else None
    if body:
        text += " {"
    if statement.source:
        text += f"  # {statement.source}"
    yield text
    if body:
        yield from _body(body, indent)


def _body(body: Body, indent: str) -> Iterator[str]:
    for statement in body.statements:
        yield from _statement(statement, indent + "  ")
    yield f"{indent}  return {write(body.result)}"
    yield f"{indent}}}"


def _what(what: Input | Constant | SubGraph | Call) -> str:
    match what:
        case Input(slot):
            return f"{slot.role} {json.dumps(slot.name)}" if slot else "arg"
        case Constant():
            return f"const {json.dumps(what.target)}"
        case SubGraph():
            return f"graph {json.dumps(what.target)}"
    arguments = [write(arg) for arg in what.args]
    arguments += [f"{name}={write(arg)}" for name, arg in what.kwargs.items()]
    return f"{what.op}({', '.join(arguments)})"


def _values(constant: Constant) -> str:
    if constant.values is None:
        return ""
    if isinstance(constant.values, bytes):
        return f' = bytes "{constant.values.hex()}"'
    return f" = [{', '.join(map(repr, constant.values))}]"


# -- types and arguments ---------------------------------------------------------------------------


def write_type(type_: Type) -> str:
    """A type as text; strides and device only where they are not the usual ones."""
    if isinstance(type_, str):
        return type_
    if isinstance(type_, SizeType):
        return f"int {write_size(type_.value)}"
    if isinstance(type_, tuple):
        return _parenthesised([write_type(item) for item in type_])
    text = f"{DTYPE_WORDS[type_.dtype]}[{_integers(type_.shape)}]"
    if type_.stride != default_stride(type_.shape):
        text += f"{{{_integers(type_.stride)}}}"
    return text if type_.device == CPU else f"{text} {type_.device}"


def write(value: Literal) -> str:
    """An argument as text."""
    match value:
        case str():
            return json.dumps(value)
        case None | bool() | int() | float():
            return repr(value)
        case complex():
            return f"complex({value.real!r}, {value.imag!r})"
        case Ref():
            return f"%{value.name}"
        case Slice():
            return f"slice({', '.join(map(write, value.parts))})"
        case EllipsisType():
            return "Ellipsis"
        case OpName():
            return value.name
        case tuple():
            return _parenthesised([write(item) for item in value])
        case list():
            return f"[{', '.join(write(item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{json.dumps(k)}: {write(v)}' for k, v in value.items())}}}"
    return word_of(value)


def _integers(values: tuple[Size, ...]) -> str:
    return ",".join(map(write_size, values))


def _parenthesised(items: list[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
