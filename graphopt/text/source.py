"""A text as numbered lines of tokens, and errors that point into it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from graphopt.errors import TextError
from graphopt.text.syntax import Place

_TOKEN = re.compile(
    r"""
      (?P<space>   [ \t\r]+ | \#.*)
    | (?P<value>   %\w+)
    | (?P<module>  @(?: "(?:[^"\\]|\\.)*" | [\w.]+ ))
    | (?P<string>  "(?:[^"\\]|\\.)*")
    | (?P<number>  -?(?: \d+\.?\d*(?:[eE][+-]?\d+)? | (?:inf|nan)\b ))
    | (?P<word>    [A-Za-z_]\w*(?:\.\w+)*(?::\d+)?)
    | (?P<mark>    [()\[\]{},=:!+*/%-])
    """,
    re.VERBOSE,
)
_IN_SIZES = ("(", ")", ",", "+", "-", "*", "/", "%")
_SHOWN = 100  # characters of a long line that an error shows
_DEEPEST = 32  # brackets within one another; no graph has more than a few
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1  # whole numbers that a tensor may hold


class Token(NamedTuple):
    """One word, number or mark; `kind` is a group of the pattern above, or ``"end"``."""

    kind: str
    text: str
    place: Place

    def __str__(self) -> str:
        return f"`{self.text}`" if self.text else "the end of the line"


class Source:
    """The lines of one text."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")

    def error(self, place: Place, message: str, hint: str = "") -> TextError:
        """An error with the line and a caret under the column."""
        line = self.lines[place.line - 1].rstrip()
        first = max(0, min(place.column - _SHOWN * 2 // 3, len(line) - _SHOWN))
        shown = ("…" if first else "") + line[first : first + _SHOWN]
        caret = " " * (place.column - 1 - first + (first > 0)) + "^"
        where = f"line {place.line}, column {place.column}\n      {shown}\n      {caret}"
        return TextError(message, where=where, hint=hint)

    def __iter__(self) -> Iterator[Line]:
        """All lines that say something."""
        for number in range(1, len(self.lines) + 1):
            line = Line(self, number)
            if not line.done:
                yield line


class Line:
    """A cursor over the tokens of one line."""

    def __init__(self, source: Source, number: int) -> None:
        self.source = source
        self.number = number
        self._tokens = list(self._split(source.lines[number - 1]))
        self._next = 0
        self._depth = 0

    def _split(self, text: str) -> Iterator[Token]:
        position = 0
        while position < len(text):
            place = Place(self.number, position + 1)
            match = _TOKEN.match(text, position)
            if match is None:
                unfinished = text[position] in '"@'
                raise self.source.error(
                    place, "unfinished string" if unfinished else "unexpected character"
                )
            if match.lastgroup != "space":
                yield Token(match.lastgroup or "", match.group(), place)
            position = match.end()
        yield Token("end", "", Place(self.number, len(text.rstrip()) + 1))

    @property
    def done(self) -> bool:
        """Whether everything was read."""
        return self.peek.kind == "end"

    @property
    def peek(self) -> Token:
        """The token that is read next."""
        return self._tokens[self._next]

    def error(self, message: str, hint: str = "", at: Token | None = None) -> TextError:
        """An error at a token, by default the next one."""
        return self.source.error((at or self.peek).place, message, hint)

    def next(self) -> Token:
        """Read one token."""
        token = self.peek
        self._next += token.kind != "end"
        return token

    def accept(self, text: str) -> bool:
        """Read the next token if it is the mark or word `text`."""
        found = self.peek.text == text and self.peek.kind in ("mark", "word")
        if found:
            self.next()
        return found

    def expect(self, text: str) -> Token:
        """Read a mark or word that must come now."""
        token = self.peek
        if not self.accept(text):
            raise self.error(f"expected `{text}` but found {token}")
        return token

    def take(self, kind: str, what: str) -> Token:
        """Read a token of a kind that must come now; `what` names it in the error."""
        if self.peek.kind != kind:
            raise self.error(f"expected {what} but found {self.peek}")
        return self.next()

    def string(self, what: str) -> str:
        """Read a quoted string."""
        return self.unquote(self.take("string", f"{what} in double quotes"))

    def unquote(self, token: Token, skip: int = 0) -> str:
        """The string that a token writes, `skip` characters after its start."""
        try:
            value = str(json.loads(token.text[skip:]))
            value.encode()  # half of a pair of surrogates is no character
        except ValueError as error:
            raise self.error("this string has a wrong escape", at=token) from error
        return value

    def whole(self, token: Token) -> int:
        """The whole number that a token writes."""
        # Python reads no more than some thousand digits, and torch no more than 20.
        value = int(token.text) if len(token.text) <= len(str(_SMALLEST)) else None
        if value is None or not _SMALLEST <= value <= _LARGEST:
            raise self.error("this number is too large: it has more than 64 bits", at=token)
        return value

    @contextmanager
    def within(self) -> Iterator[None]:
        """Read what is within one more pair of brackets."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self.error(f"more than {_DEEPEST} brackets within one another")
        yield
        self._depth -= 1

    def names_argument(self) -> bool:
        """Whether ``name=`` comes next."""
        return self.peek.kind == "word" and self._tokens[self._next + 1].text == "="

    def expression(self) -> str:
        """Read up to what ends the expression of a size, without spaces."""
        text, depth = "", 0
        while self.peek.kind in ("word", "number", "value") or self.peek.text in _IN_SIZES:
            if (self.peek.text == ")" and not depth) or (self.peek.text == "," and not depth):
                break
            depth += {"(": 1, ")": -1}.get(self.peek.text, 0)
            text += self.next().text
        return text

    def finish(self) -> None:
        """Refuse whatever is left on the line."""
        if not self.done:
            raise self.error(f"unexpected {self.peek} at the end of this line")
