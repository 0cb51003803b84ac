"""Text to `Program`: everything that can be checked without running an operator."""

from __future__ import annotations

from graphopt.errors import TextError
from graphopt.graph import Level
from graphopt.plan import Phase, Role, Slot
from graphopt.text.expressions import number, read_arguments, read_literal, read_type
from graphopt.text.names import closest
from graphopt.text.source import Line, Source
from graphopt.text.syntax import (
    INPUT_WORDS,
    NONE,
    OUTPUT_WORDS,
    Body,
    Call,
    Constant,
    Input,
    Place,
    Program,
    Statement,
    SubGraph,
    Type,
)

LAST_LINE = "end"

_ORDER = ("start", "facts", "inputs", "body", "outputs")
_HINT = "sections are forward, backward, and each of them with inputs or outputs"


def read(source: Source) -> Program:
    """The program that a text says; raises `TextError` at the first thing that is wrong."""
    return _Reader(source).program()


class _Scope:
    """The values and sub-graphs that the lines of one body may use."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}  # name -> line that defines it
        self.graphs: set[str] = set()


class _Reader:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._lines = iter(source)
        self._slots: dict[tuple[Role, str], int] = {}
        self._outputs: list[tuple[Slot, str]] = []

    # -- the whole text --------------------------------------------------------------------------

    def program(self) -> Program:
        header = next(self._lines, None)
        if header is None:
            raise TextError("the text is empty", hint="a text starts with: gopt 1 joint torch 2.13")
        level, release = read_header(header)
        self._refuse_truncated()
        scope = _Scope()
        facts = {"captured"}
        statements: list[Statement] = []
        section, phase = "facts", Phase.FORWARD
        for line in self._lines:
            word = line.peek.text if line.peek.kind == "word" else ""
            if word == LAST_LINE:
                break
            if word == "facts":
                if section != "facts":
                    raise line.error("facts stand right below the first line")
                facts = read_facts(line)
            elif word in (Phase.FORWARD, Phase.BACKWARD):
                section, phase = self._section(line, section)
            elif section == "facts":
                raise line.error(f"expected a section but found {line.peek}", _HINT)
            elif section == "outputs":
                self._output(line, phase, scope)
            else:
                statements.append(self._statement(line, phase, scope, section))
            line.finish()
        line.expect(LAST_LINE)
        line.finish()
        for line in self._lines:
            raise line.error(f"a text stops at its line `{LAST_LINE}`")
        return Program(level, release, frozenset(facts), tuple(statements), tuple(self._outputs))

    def _refuse_truncated(self) -> None:
        *_, last = self._source
        if last.peek.text != LAST_LINE:
            end = Place(last.number, len(self._source.lines[last.number - 1].rstrip()) + 1)
            raise self._source.error(
                end,
                f"the text ends early, after line {last.number}",
                f"the last line of a complete text is `{LAST_LINE}`",
            )

    def _section(self, line: Line, before: str) -> tuple[str, Phase]:
        token = line.next()
        section = "body"
        if not line.done:
            section = line.take("word", "inputs or outputs").text
        order = ["facts", "inputs", "body", "outputs"]
        if section not in order[1:]:
            raise line.error("there is no such section", _HINT, at=token)
        if order.index(section) < order.index(before):
            raise line.error(f"the {section} come before the {before}", _HINT, at=token)
        phase = Phase(token.text)
        if section == "outputs" and phase is Phase.FORWARD and self._has_backward_outputs():
            raise line.error("forward outputs come before backward outputs", at=token)
        return section, phase

    def _has_backward_outputs(self) -> bool:
        return any(slot.phase is Phase.BACKWARD for slot, _ in self._outputs)

    def _output(self, line: Line, phase: Phase, scope: _Scope) -> None:
        token = line.take("word", "output, mutation or grad")
        if token.text not in OUTPUT_WORDS:
            raise line.error(
                f"`{token.text}` is not an output", closest(token.text, OUTPUT_WORDS), at=token
            )
        slot = self._slot(line, OUTPUT_WORDS[token.text], phase)
        line.expect("=")
        name = line.take("value", "a value").text[1:]
        if name not in scope.values:
            raise line.error(f"the value %{name} is not defined", closest(name, scope.values))
        self._outputs.append((slot, name))

    def _slot(self, line: Line, role: Role, phase: Phase) -> Slot:
        token = line.peek
        name = line.string("a name")
        before = self._slots.setdefault((role, name), line.number)
        if before != line.number:
            raise line.error(f"{role} {token} already stands on line {before}", at=token)
        return Slot(role, name, phase)

    # -- one line --------------------------------------------------------------------------------

    def _statement(self, line: Line, phase: Phase, scope: _Scope, section: str) -> Statement:
        value = line.take("value", "a value")
        name = value.text[1:]
        if name in scope.values:
            raise line.error(
                f"the value {value.text} is already defined on line {scope.values[name]}",
                at=value,
            )
        line.expect("=")
        place = line.peek.place
        what = self._what(line, phase, scope, section)
        type_: Type = NONE
        type_place = line.peek.place
        if line.accept(":"):
            type_place = line.peek.place
            type_ = read_type(line)
        if isinstance(what, Constant) and line.accept("="):
            what = Constant(what.target, read_values(line))
        module = read_module(line)
        recompute, region = read_recompute(line)
        if isinstance(what, SubGraph) and line.accept("{"):
            line.finish()
            scope.graphs.add(what.target)
            what = SubGraph(what.target, self._body(phase))
        elif isinstance(what, SubGraph) and what.target not in scope.graphs:
            raise line.error("the first use of a sub-graph shows it: expected `{`")
        scope.values[name] = line.number
        return Statement(
            name, what, type_, phase, module, recompute, region, "", place, type_place
        )

    def _what(
        self, line: Line, phase: Phase, scope: _Scope, section: str
    ) -> Input | Constant | SubGraph | Call:
        token = line.take("word", "an operator")
        if section == "inputs" or (token.text in INPUT_WORDS and line.peek.kind == "string"):
            if token.text not in INPUT_WORDS:
                hint = closest(token.text, INPUT_WORDS) or f"one of {', '.join(INPUT_WORDS)}"
                raise line.error(f"`{token.text}` is not an input", hint, at=token)
            if section != "inputs":
                raise line.error("inputs stand in the section of inputs", at=token)
            return Input(self._slot(line, INPUT_WORDS[token.text], phase))
        if section == "graph" and token.text == "arg":
            return Input(None)
        if token.text == "const":
            return Constant(line.string("a name"), None)
        if token.text == "graph":
            return SubGraph(line.string("a name"), None)
        args, kwargs = read_arguments(line, scope.values)
        return Call(token.text, args, kwargs)

    def _body(self, phase: Phase) -> Body:
        """The lines of a sub-graph, up to its ``return`` and closing brace."""
        scope = _Scope()
        statements = []
        line = next(self._lines)
        while line.peek.kind == "value":
            statements.append(self._statement(line, phase, scope, "graph"))
            line = self._after(line)
        line.expect("return")
        result = read_literal(line, scope.values)
        line = self._after(line)
        line.expect("}")
        line.finish()
        return Body(tuple(statements), result)

    def _after(self, line: Line) -> Line:
        line.finish()
        return next(self._lines)

