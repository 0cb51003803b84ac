"""Text to `Program`: everything that can be checked without running an operator."""

from __future__ import annotations

import re
from functools import cache
from keyword import iskeyword

from torch import fx

from graphopt.plan import Phase, Role, Slot
from graphopt.text.fields import read_module, read_recompute, read_values
from graphopt.text.header import read_facts, read_header, read_symbol
from graphopt.text.names import closest
from graphopt.text.operands import defined, read_arguments, read_literal, read_type
from graphopt.text.sizes import Symbol
from graphopt.text.source import Line, Source
from graphopt.text.syntax import (
    DEFAULT_FACTS,
    INPUT_WORDS,
    LAST_LINE,
    NONE,
    OUTPUT_WORDS,
    Body,
    Call,
    Constant,
    Input,
    Program,
    Statement,
    SubGraph,
    Type,
)

# The order of sections; "start" and "facts" are no sections that a text names.
_ORDER = ("start", "facts", "inputs", "body", "outputs")
_DEEPEST = 16
_SECTIONS = "sections are: forward, backward, and each of them followed by inputs or outputs"


def read_program(source: Source) -> Program:
    """The program that a text says; raises `TextError` at the first thing that is wrong."""
    return _Reader(source).program()


@cache
def _reserved() -> frozenset[str]:
    """Names that every module has already."""
    return frozenset(dir(fx.GraphModule({}, fx.Graph())))


def _names_attribute(target: str) -> bool:
    parts = target.split(".")
    words = all(re.fullmatch(r"\w+", part) and not iskeyword(part) for part in parts)
    return words and parts[0] not in _reserved()


class _Scope:
    """The values and sub-graphs that the lines of one body may use."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}  # name -> line that defines it
        self.attributes: dict[str, str] = {}  # target -> "const" or "graph"

    def attribute(self, line: Line, kind: str) -> str:
        """Read the name of a constant or sub-graph of the module."""
        token = line.peek
        target = line.string("a name")
        if not _names_attribute(target):
            raise line.error(f"{token} cannot name an attribute", at=token)
        for other, what in self.attributes.items():
            nested = f"{other}.".startswith(f"{target}.") or f"{target}.".startswith(f"{other}.")
            if nested and (other, what) != (target, kind):
                raise line.error(f'{token} collides with {what} "{other}"', at=token)
        if kind == "const":
            self.attributes[target] = kind
        return target


class _Reader:
    def __init__(self, source: Source) -> None:
        self._lines = iter(source)
        self._level, self._release = read_header(source, next(self._lines, None))
        self._facts = DEFAULT_FACTS
        self._symbols: dict[str, Symbol] = {}
        self._slots: dict[tuple[Role, str], int] = {}
        self._statements: list[Statement] = []
        self._outputs: list[tuple[Slot, str]] = []
        self._depth = 0

    # -- sections --------------------------------------------------------------------------------

    def program(self) -> Program:
        scope = _Scope()
        section, phase = "start", Phase.FORWARD
        for line in self._lines:
            word = line.peek.text if line.peek.kind == "word" else ""
            if word == LAST_LINE:
                line.next()
                line.finish()
                break
            if word == "facts" and section == "start" and not self._symbols:
                section, self._facts = "facts", read_facts(line)
            elif word == "symbol" and section in ("start", "facts"):
                symbol = read_symbol(line, self._symbols)
                self._symbols[symbol.name] = symbol
            elif word in (Phase.FORWARD, Phase.BACKWARD):
                section, phase = self._section(line, section)
            elif section == "outputs":
                self._output(line, phase, scope)
            elif section in ("inputs", "body"):
                self._statements.append(self._statement(line, section, phase, scope))
            else:
                raise line.error(f"expected a section but found {line.peek}", _SECTIONS)
            line.finish()
        for line in self._lines:
            raise line.error(f"a text stops at its line `{LAST_LINE}`")
        return Program(
            self._level,
            self._release,
            self._facts,
            tuple(self._statements),
            tuple(self._outputs),
            tuple(self._symbols.values()),
        )

    def _section(self, line: Line, before: str) -> tuple[str, Phase]:
        token = line.next()
        phase = Phase(token.text)
        section = "body" if line.done else line.next().text
        if section not in _ORDER[2:]:
            raise line.error("there is no such section", _SECTIONS, at=token)
        if _ORDER.index(section) < _ORDER.index(before):
            raise line.error(f"{section} cannot follow {before}", _SECTIONS, at=token)
        if section == "outputs" and phase is Phase.FORWARD and before == "outputs":
            raise line.error("forward outputs come before backward outputs", at=token)
        return section, phase

    def _output(self, line: Line, phase: Phase, scope: _Scope) -> None:
        token = line.take("word", "output, mutation or grad")
        if token.text not in OUTPUT_WORDS:
            hint = closest(token.text, OUTPUT_WORDS)
            raise line.error(f"{token} is not an output", hint, at=token)
        slot = self._slot(line, OUTPUT_WORDS[token.text], phase)
        line.expect("=")
        value = line.take("value", "a value")
        self._outputs.append((slot, defined(line, value, scope.values)))

    def _slot(self, line: Line, role: Role, phase: Phase) -> Slot:
        token = line.peek
        name = line.string("a name")
        before = self._slots.setdefault((role, name), line.number)
        if before != line.number:
            raise line.error(f"{role} {token.text} already stands on line {before}", at=token)
        return Slot(role, name, phase)

    # -- one value -------------------------------------------------------------------------------

    def _statement(self, line: Line, section: str, phase: Phase, scope: _Scope) -> Statement:
        value = line.take("value", "a value")
        name = value.text[1:]
        if name in scope.values:
            before = scope.values[name]
            raise line.error(
                f"the value {value.text} is already defined on line {before}", at=value
            )
        line.expect("=")
        place = line.peek.place
        what = self._what(line, section, phase, scope)
        type_: Type = NONE
        type_place = line.peek.place
        if line.accept(":"):
            type_place = line.peek.place
            type_ = read_type(line, self._symbols)
        if isinstance(what, Constant) and line.accept("="):
            what = Constant(what.target, read_values(line))
        module = read_module(line)
        recompute, region = read_recompute(line)
        if isinstance(what, SubGraph):
            what = self._sub_graph(line, what, phase, scope)
        scope.values[name] = line.number
        return Statement(name, what, type_, phase, module, recompute, region, "", place, type_place)

    def _what(
        self, line: Line, section: str, phase: Phase, scope: _Scope
    ) -> Input | Constant | SubGraph | Call:
        token = line.take("word", "an operator")
        is_input = token.text in INPUT_WORDS and line.peek.kind == "string"
        if section == "inputs" and not is_input:
            hint = closest(token.text, INPUT_WORDS) or f"inputs are {', '.join(INPUT_WORDS)}"
            raise line.error(f"{token} is not an input", hint, at=token)
        if is_input:
            if section != "inputs":
                raise line.error("an input outside the section of inputs", at=token)
            return Input(self._slot(line, INPUT_WORDS[token.text], phase))
        if section == "graph" and token.text == "arg":
            return Input(None)
        if token.text == "const":
            return Constant(scope.attribute(line, "const"), None)
        if token.text == "graph":
            return SubGraph(scope.attribute(line, "graph"), None)
        args, kwargs = read_arguments(line, scope.values)
        return Call(token.text, args, kwargs)

    def _sub_graph(self, line: Line, what: SubGraph, phase: Phase, scope: _Scope) -> SubGraph:
        brace = line.peek
        if not line.accept("{"):
            if what.target not in scope.attributes:
                raise line.error("the first use of a sub-graph shows it: expected `{`")
            return what
        if what.target in scope.attributes:
            raise line.error(f'the sub-graph "{what.target}" was shown before', at=brace)
        line.finish()
        scope.attributes[what.target] = "graph"
        self._depth += 1
        if self._depth > _DEEPEST:
            raise line.error(f"more than {_DEEPEST} sub-graphs within one another", at=brace)
        body = self._body(phase)
        self._depth -= 1
        return SubGraph(what.target, body)

    def _body(self, phase: Phase) -> Body:
        """The lines of a sub-graph, up to its ``return`` and closing brace."""
        scope = _Scope()
        statements = []
        line = next(self._lines)  # there is one: the text ends with its last line
        while line.peek.kind == "value":
            statements.append(self._statement(line, "graph", phase, scope))
            line.finish()
            line = next(self._lines)
        line.expect("return")
        result = read_literal(line, scope.values)
        line.finish()
        next(self._lines).expect("}")
        return Body(tuple(statements), result)
