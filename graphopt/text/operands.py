"""Reads types and arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import EllipsisType
from typing import TypeVar

import torch

from graphopt.text.names import (
    CPU,
    DTYPES,
    SHORT,
    closest,
    constant_of,
    device_of,
    operator_hint,
    operator_of,
)
from graphopt.text.sizes import Size, Symbol, read_size
from graphopt.text.source import Line, Token
from graphopt.text.syntax import (
    SCALARS,
    Literal,
    OpName,
    Ref,
    SizeType,
    Slice,
    TensorType,
    Type,
    default_stride,
)

T = TypeVar("T")


def read_type(line: Line, symbols: Mapping[str, Symbol]) -> Type:
    """Read one type, whose sizes may use the symbols."""
    if line.accept("("):
        return tuple(_until(line, ")", lambda: read_type(line, symbols)))
    token = line.take("word", "a type")
    if token.text == "int" and _begins_size(line.peek):
        return SizeType(_size(line, symbols))
    if token.text in SCALARS and line.peek.text != "[":
        return token.text
    if token.text not in DTYPES:
        hint = f"write {SHORT[token.text]}" if token.text in SHORT else ""
        raise line.error(
            f"`{token.text}` is not a type", hint or closest(token.text, DTYPES), at=token
        )
    line.expect("[")
    shape = tuple(_until(line, "]", lambda: _size(line, symbols)))
    stride = default_stride(shape)
    brace = line.peek
    if line.accept("{"):
        stride = tuple(_until(line, "}", lambda: _size(line, symbols)))
        if len(stride) != len(shape):
            raise line.error(f"{len(stride)} strides for {len(shape)} dimensions", at=brace)
    return TensorType(DTYPES[token.text], shape, stride, _device(line))


def _begins_size(token: Token) -> bool:
    return token.kind in ("number", "word") or token.text in ("(", "-")


def _size(line: Line, symbols: Mapping[str, Symbol]) -> Size:
    token = line.peek
    if not _begins_size(token):
        raise line.error(f"expected a size but found {token}")
    text = line.expression()
    if text == token.text and token.kind == "number":
        if not token.text.isdecimal():
            raise line.error("sizes and strides are whole numbers, zero or more", at=token)
        return line.whole(token)
    try:
        return read_size(text, symbols)
    except ValueError as error:
        raise line.error(str(error), at=token) from error


def _device(line: Line) -> torch.device:
    if line.peek.kind != "word":
        return CPU
    token = line.next()
    device = device_of(token.text)
    if device is None:
        raise line.error(f"`{token.text}` is not a device", "write cpu, cuda:0 or meta", at=token)
    return device


def read_literal(line: Line, known: Collection[str]) -> Literal:
    """Read one argument, which may use the values `known`."""
    token = line.next()
    match token.kind:
        case "value":
            return Ref(defined(line, token, known))
        case "string":
            return line.unquote(token)
        case "number":
            return number(line, token)
        case "word":
            return _word(line, token, known)
    match token.text:
        case "(":
            return tuple(_until(line, ")", lambda: read_literal(line, known)))
        case "[":
            return _until(line, "]", lambda: read_literal(line, known))
        case "{":
            return dict(_until(line, "}", lambda: _entry(line, known)))
    raise line.error(f"expected an argument but found {token}", at=token)


def defined(line: Line, token: Token, known: Collection[str]) -> str:
    """The name of the value that a token uses, which must be one of `known`."""
    if token.text[1:] not in known:
        hint = closest(token.text, [f"%{name}" for name in known])
        raise line.error(
            f"the value {token.text} is not defined",
            hint or "a value must be defined on a line above its use",
            at=token,
        )
    return token.text[1:]


def number(line: Line, token: Token) -> int | float:
    """The value of a number token."""
    whole = token.text.removeprefix("-").isdecimal()
    return line.whole(token) if whole else float(token.text)


_CONSTANTS: dict[str, bool | EllipsisType | None] = {
    "None": None,
    "True": True,
    "False": False,
    "Ellipsis": ...,
}


def _word(line: Line, token: Token, known: Collection[str]) -> Literal:
    if token.text in _CONSTANTS:
        return _CONSTANTS[token.text]
    if token.text == "complex" and line.accept("("):
        parts = _until(line, ")", lambda: float(line.take("number", "a number").text))
        if len(parts) != 2:
            raise line.error("a complex number has two parts", at=token)
        return complex(*parts)
    if token.text == "slice" and line.accept("("):
        bounds = tuple(_until(line, ")", lambda: read_literal(line, known)))
        if len(bounds) != 3:
            raise line.error("a slice has a start, a stop and a step", at=token)
        return Slice(bounds)
    if "." in token.text:
        if operator_of(token.text) is None:
            hint = operator_hint(token.text)
            raise line.error(f"there is no operator {token.text}", hint, at=token)
        return OpName(token.text)
    value = constant_of(token.text)
    if value is None:
        hint = closest(token.text, [*DTYPES, *_CONSTANTS]) or "texts stand in double quotes"
        raise line.error(f"`{token.text}` is not an argument", hint, at=token)
    return value


def _entry(line: Line, known: Collection[str]) -> tuple[str, Literal]:
    key = line.string("a key")
    line.expect(":")
    return key, read_literal(line, known)


def read_arguments(
    line: Line, known: Collection[str]
) -> tuple[tuple[Literal, ...], dict[str, Literal]]:
    """Read ``(…)``: positional arguments, then ``name=value`` ones."""
    args: list[Literal] = []
    kwargs: dict[str, Literal] = {}

    def argument() -> None:
        token = line.peek
        if line.names_argument():
            name = line.next().text
            line.expect("=")
            if name in kwargs:
                raise line.error(f"the argument {name} is given twice", at=token)
            kwargs[name] = read_literal(line, known)
        elif kwargs:
            raise line.error("an argument without a name after one with a name", at=token)
        else:
            args.append(read_literal(line, known))

    line.expect("(")
    _until(line, ")", argument)
    return tuple(args), kwargs


def _until(line: Line, close: str, item: Callable[[], T]) -> list[T]:
    """Read items between commas up to `close`; a comma may also stand before `close`."""
    items: list[T] = []
    with line.within():
        while not line.accept(close):
            items.append(item())
            if not line.accept(","):
                line.expect(close)
                break
    return items
