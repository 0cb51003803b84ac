"""Symbolic sizes: expressions of symbols as text and back.

Symbols are called ``s0``, ``s1``, … in the order of the graph's inputs, whatever torch calls them,
so that a text does not depend on the process that it was written in.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod
from torch.utils._sympy.printers import PythonPrinter

Size: TypeAlias = Any
"""An ``int``, or a sympy expression of symbols, for which there are no types."""


@dataclass(frozen=True)
class Symbol:
    """``symbol s0 = 9 from 2 to 512``: a size that varies.

    Attributes:
        name: what expressions call it.
        hint: the size in the captured call.
        least: the smallest size that the graph holds for; ``None`` where nothing limits it.
        most: the largest one; ``None`` where nothing limits it.
    """

    name: str
    hint: int
    least: int | None = None
    most: int | None = None

    @property
    def expression(self) -> sympy.Symbol:
        """It, as an expression."""
        positive = True if self.least is not None and self.least > 0 else None
        return sympy.Symbol(self.name, integer=True, positive=positive)


def write_size(size: Size) -> str:
    """A size as text, without spaces."""
    if isinstance(size, int):
        return str(size)
    text: str = PythonPrinter().doprint(size)
    return text.replace(" ", "")


_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: FloorDiv,
    ast.Mod: Mod,
}
_LONGEST, _SHOWN = 2000, 40  # characters of an expression, and of one in an error
_LARGEST, _LARGEST_POWER = 2**63, 8
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"max": Max, "min": Min}


def read_size(text: str, symbols: Mapping[str, Symbol]) -> Size:
    """The inverse of `write_size`.

    Raises:
        ValueError: the text is no such expression, or uses another symbol.
    """
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    if len(text) > _LONGEST:
        raise ValueError(f"`{shown}` is too long for a size")
    try:
        tree = ast.parse(text, mode="eval").body
        value = sympy.sympify(_evaluated(tree, symbols))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"`{shown}` is not a size") from error
    except (ArithmeticError, TypeError) as error:  # of sympy: division by zero, say
        raise ValueError(f"`{shown}` is not a size: {error}") from error
    if value.is_Integer:
        return int(_limited(value))
    if not value.free_symbols or value.is_integer is False:
        raise ValueError(f"`{shown}` is no whole number")
    return value


def _evaluated(tree: ast.AST, symbols: Mapping[str, Symbol]) -> Any:
    match tree:
        case ast.Constant(value=int(number)) if type(number) is int:
            return _limited(sympy.Integer(number))
        case ast.Name(id=name) if name in symbols:
            return symbols[name].expression
        case ast.Name(id=name):
            raise ValueError(f"no line says what the symbol {name} is")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand, symbols)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            exponent = _evaluated(right, symbols)
            if not (exponent.is_Integer and 0 <= exponent <= _LARGEST_POWER):
                raise ValueError(f"a power is 0 to {_LARGEST_POWER}, and no `{exponent}`")
            return _limited(_evaluated(left, symbols) ** exponent)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATORS:
            pair = _evaluated(left, symbols), _evaluated(right, symbols)
            return _limited(_OPERATORS[type(kind)](*pair))
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluated(argument, symbols) for argument in arguments))
    raise ValueError(f"`{ast.unparse(tree)}` is not a size")


def _limited(value: Any) -> Any:
    if value.is_Integer and abs(value) >= _LARGEST:
        raise ValueError("a size has less than 64 bits")
    return value


class Symbols:
    """The symbols of one graph, by torch's own.

    Attributes:
        found: in the order in which they were added.
    """

    def __init__(self) -> None:
        self.found: list[Symbol] = []
        self._ours: dict[sympy.Symbol, sympy.Symbol] = {}
        # Instead of ours, which may be called as others of torch are.
        self._marks: dict[sympy.Symbol, sympy.Dummy] = {}

    def add(self, own: sympy.Symbol, symbol: Symbol) -> None:
        """Know a symbol of torch by another name."""
        self.found.append(symbol)
        self._ours[own] = symbol.expression
        self._marks[own] = sympy.Dummy()

    def note(self, value: object) -> None:
        """Know the symbol that an input of a graph is, if it is one.

        An input that is computed with others (a number, outside of the graph) counts as one.
        """
        if not isinstance(value, torch.SymInt) or not value.node.has_hint():
            return
        own = value.node.expr
        if own.is_number or self._knows(own):
            return
        bounds = value.node.shape_env.bound_sympy(own)
        least, most = (
            int(b) if -_ENDLESS < b < _ENDLESS else None for b in (bounds.lower, bounds.upper)
        )
        name = f"s{len(self.found)}"
        self.add(own, Symbol(name, int(value.node.hint), least, most))

    def _knows(self, own: Any) -> bool:
        return bool(own.xreplace(self._marks).free_symbols <= set(self._marks.values()))

    def expression(self, size: Any) -> Size | None:
        """A size in terms of these symbols; ``None`` where that cannot be."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        own = size.node.expr
        if not self._knows(own):
            return None
        expression = own.xreplace(self._ours)
        return int(expression) if expression.is_Integer else expression


_ENDLESS = 1 << 62
