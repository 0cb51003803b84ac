"""Option values of the spec language: text to typed value and back.

The type is that of the dataclass field: `int`, `float`, `bool` (``true``, ``false``), `str`,
`Literal` choices, `None` (``none``), ``tuple[X, ...]`` (``a|b``, empty text for no element) and
unions of these. A string with characters that the language uses itself, or that would be read as
another type of a union, is written as a JSON string in double quotes.
"""

from __future__ import annotations

import json
import re
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

_BARE = re.compile(r'[^\s{},|="]+')
_PIECES = re.compile(r'"(?:[^"\\]|\\.)*"|\||[^|"]+|"')
# Members of a union are tried from the narrowest to the widest.
_WIDTH = (NoneType, bool, int, float, Literal, str, tuple)


def parse_value(text: str, kind: object) -> object:
    """The value of type `kind` that `text` says.

    Raises:
        ValueError: `text` says no value of this type, or `kind` is not a type of the language.
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _parse_union(text, kind)
    if origin is tuple:
        return tuple(parse_value(part, _element(kind)) for part in _split(text))
    if origin is Literal:
        return _choice(text, get_args(kind))
    if kind is NoneType:
        return _choice(text, (None,))
    if kind is bool:
        return _choice(text, (True, False))
    if kind is int:
        return int(text)
    if kind is float:
        return float(text)
    if kind is str:
        return _unquote(text)
    raise ValueError(f"the spec language has no values of type {kind}")


def format_value(value: object, kind: object) -> str:
    """The text that `parse_value` reads as `value`.

    Raises:
        ValueError: no text does.
    """
    if isinstance(value, tuple) and (member := _tuple_member(kind)) is not None:
        text = "|".join(format_value(part, _element(member)) for part in value)
    elif isinstance(value, str):
        bare = bool(_BARE.fullmatch(value)) and _says(value, value, kind)
        text = value if bare else json.dumps(value)
    else:
        text = _plain(value)
    if not _says(text, value, kind):
        raise ValueError(f"the spec language cannot say {value!r} as {describe(kind)}")
    return text


def describe(kind: object) -> str:
    """What a value of this type is, for people: ``"an int"``, ``"one of: a, b"``."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe(member) for member in get_args(kind))
    if origin is tuple:
        return f"any number of values separated by '|', each {describe(_element(kind))}"
    if origin is Literal:
        choices = [_plain(choice) for choice in get_args(kind)]
        return choices[0] if len(choices) == 1 else "one of: " + ", ".join(choices)
    words: dict[object, str] = {
        NoneType: "none",
        bool: "true or false",
        int: "an int",
        float: "a float",
        str: "text",
    }
    return words.get(kind, str(kind))


def _says(text: str, value: object, kind: object) -> bool:
    try:
        return parse_value(text, kind) == value
    except ValueError:
        return False


def _plain(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _parse_union(text: str, kind: object) -> object:
    def width(member: object) -> int:
        form = get_origin(member) or member
        return _WIDTH.index(form) if form in _WIDTH else len(_WIDTH)

    for member in sorted(get_args(kind), key=width):
        try:
            return parse_value(text, member)
        except ValueError:
            continue
    raise ValueError(f"{text!r} is not {describe(kind)}")


def _choice(text: str, choices: tuple[object, ...]) -> object:
    for choice in choices:
        if text == _plain(choice) or (text.startswith('"') and _unquote(text) == choice):
            return choice
    raise ValueError(f"{text!r} is none of the choices")


def _unquote(text: str) -> str:
    if not text:
        raise ValueError('empty text is written ""')
    if not text.startswith('"'):
        return text
    return str(json.loads(text))


def _split(text: str) -> list[str]:
    """The elements of a tuple: parts between ``|`` outside quotes."""
    if not text:
        return []
    parts = [""]
    for piece in _PIECES.findall(text):
        if piece == "|":
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]


def _element(kind: object) -> object:
    match get_args(kind):
        case (element, rest) if rest is ...:
            return element
    raise ValueError(f"the spec language has no values of type {kind}")


def _tuple_member(kind: object) -> object | None:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((member for member in members if get_origin(member) is tuple), None)
