"""The spec language: ``cleanup,schedule{link=10gbe,memory=0.5}`` to passes and back.

A spec is a list of pass names, each with the options that differ from their defaults. Names are in
snake_case, values have the type of the pass's dataclass field (`graphopt.pipeline.values`). Every
error shows the spec with a caret under the column that it is about.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from typing import NoReturn, get_type_hints

from graphopt import registry
from graphopt.errors import GraphoptError, SpecError
from graphopt.passbase import Pass
from graphopt.pipeline.values import describe, format_value, parse_value

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[\w-]+")
_VALUE = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^{},"])*')


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    Attributes:
        name: the name of the dataclass field.
        kind: the type of the field.
        default: the value when the option is not given; `dataclasses.MISSING` when it must be.
    """

    name: str
    kind: object
    default: object

    def __str__(self) -> str:
        if self.default is MISSING:
            return f"{self.name} ({describe(self.kind)}, required)"
        return f"{self.name} ({describe(self.kind)}) [{format_value(self.default, self.kind)}]"


def options_of(pass_type: type[Pass]) -> tuple[Option, ...]:
    """The options of a pass, in the order of its fields.

    Raises:
        SpecError: the annotations of the class cannot be evaluated.
    """
    try:
        kinds = get_type_hints(pass_type)
    except NameError as error:
        raise SpecError(
            f"the option types of pass {pass_type.name!r} cannot be read: {error}",
            where=f"{pass_type.__module__}.{pass_type.__qualname__}",
            hint="import the types of its fields outside of `if TYPE_CHECKING`",
        ) from error
    return tuple(
        Option(
            field.name,
            kinds[field.name],
            field.default if field.default_factory is MISSING else field.default_factory(),
        )
        for field in dataclasses.fields(pass_type)
        if field.init
    )


def format_spec(passes: Iterable[Pass]) -> str:
    """The spec of these passes; ``parse_spec(format_spec(passes)) == tuple(passes)``.

    Raises:
        SpecError: an option has a value that the language cannot say.
    """
    return ",".join(format_pass(pass_) for pass_ in passes)


def format_pass(pass_: Pass) -> str:
    """The spec of one pass, without the options that have their default value."""
    options = []
    for option in options_of(type(pass_)):
        value = getattr(pass_, option.name)
        if option.default is not MISSING and value == option.default:
            continue
        try:
            options.append(f"{option.name}={format_value(value, option.kind)}")
        except ValueError as error:
            raise SpecError(f"option {option.name!r} of pass {pass_.name!r}: {error}") from error
    return f"{pass_.name}{{{','.join(options)}}}" if options else pass_.name


def parse_spec(text: str) -> tuple[Pass, ...]:
    """The passes that `text` names; an empty text is an empty pipeline.

    Raises:
        SpecError: the text is not a spec, or a pass, an option or a value does not exist.
        PluginError: a third-party pass that it names cannot be loaded.
    """
    scanner = _Scanner(text)
    passes: list[Pass] = []
    if scanner.at_end():
        return ()
    while True:
        passes.append(_pass(scanner))
        if scanner.at_end():
            return tuple(passes)
        scanner.take(",", "between two passes")


class _Scanner:
    """A position in a spec."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.column = 0

    def at_end(self) -> bool:
        self._skip(_SPACE)
        return self.column == len(self.text)

    def accept(self, mark: str) -> bool:
        self._skip(_SPACE)
        found = self.text.startswith(mark, self.column)
        self.column += len(mark) if found else 0
        return found

    def take(self, mark: str, purpose: str) -> None:
        if not self.accept(mark):
            self.fail(self.column, f"expected {mark!r} {purpose}")

    def name(self, what: str) -> tuple[str, int]:
        self._skip(_SPACE)
        start = self.column
        name = self._skip(_NAME)
        if not name:
            self.fail(start, f"expected the name of {what}")
        return name, start

    def value(self) -> tuple[str, int]:
        self._skip(_SPACE)
        start = self.column
        value = self._skip(_VALUE).strip()
        if self.text.startswith('"', self.column):
            self.fail(self.column, "this quote is never closed")
        return value, start

    def fail(self, column: int, sentence: str, hint: str = "") -> NoReturn:
        line = re.sub(r"\s", " ", self.text)
        raise SpecError(f"{sentence}\n    {line}\n    {' ' * column}^", hint=hint) from None

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.column)
        if match is None:
            return ""
        self.column = match.end()
        return match[0]


def _pass(scanner: _Scanner) -> Pass:
    name, column = scanner.name("a pass")
    try:
        pass_type: type[Pass] = registry.get(name)
    except SpecError as error:
        scanner.fail(column, error.message, error.hint)
    options = options_of(pass_type)
    values: dict[str, object] = {}
    if scanner.accept("{") and not scanner.accept("}"):
        _option(scanner, name, options, values)
        while not scanner.accept("}"):
            scanner.take(",", "or '}' after an option")
            _option(scanner, name, options, values)
    for option in options:
        if option.default is MISSING and option.name not in values:
            scanner.fail(column, f"pass {name!r} needs a value for its option {option}")
    try:
        return pass_type(**values)
    except GraphoptError as error:
        scanner.fail(column, f"pass {name!r} refuses its options: {error.message}", error.hint)
    except ValueError as error:
        scanner.fail(column, f"pass {name!r} refuses its options: {error}")


def _option(
    scanner: _Scanner, owner: str, options: Sequence[Option], values: dict[str, object]
) -> None:
    name, column = scanner.name(f"an option of pass {owner!r}")
    known = {option.name: option for option in options}
    if name not in known:
        scanner.fail(column, f"pass {owner!r} has no option {name!r}", _suggest(name, known))
    if name in values:
        scanner.fail(column, f"option {name!r} is given twice")
    scanner.take("=", f"after option {name!r}")
    text, column = scanner.value()
    try:
        values[name] = parse_value(text, known[name].kind)
    except ValueError:
        scanner.fail(
            column,
            f"option {name!r} of pass {owner!r} takes {describe(known[name].kind)}, not {text!r}",
        )


def _suggest(name: str, known: dict[str, Option]) -> str:
    if not known:
        return "it has no options"
    near = difflib.get_close_matches(name, known, n=3)
    start = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{start}its options are: {'; '.join(map(str, known.values()))}"
