"""Conditions on sizes as data: trees of whole numbers, names of sizes and a few functions.

``["==", ["%", "3", 2], 0]``: the size with the name ``3`` is even. Dynamo writes its conditions as
Python. That is parsed, never run; what another process evaluates or writes again is made of the
functions that are listed here.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import sympy  # type: ignore[import-untyped]
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from graphopt.capture.kept.fingerprints import Unkept
from graphopt.capture.kept.sources import Unreadable

Tree: TypeAlias = Any
"""A whole number, a name, or a list of a function and what it is of."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Function:
    """One that a tree may call.

    Attributes:
        syntax: of Python, which Dynamo writes; none where it is called by its name.
        of: computes it.
        symbolic: the same for torch's symbols.
        least: how many arguments it takes at least.
        most: how many at most.
        truth: whether it is true or false, and no number.
        truths: whether its arguments are.
    """

    syntax: type[ast.AST] | None
    of: Callable[..., Any]
    symbolic: Callable[..., Any]
    least: int = 2
    most: int = 2
    truth: bool = False
    truths: bool = False


def _remainder(number: Any, divisor: Any) -> Any:
    plain = number.is_nonnegative and divisor.is_nonnegative
    return (Mod if plain else PythonMod)(number, divisor)


_MANY = 1 << 10
_FUNCTIONS: Mapping[str, _Function] = {
    "+": _Function(ast.Add, operator.add, operator.add),
    "-": _Function(ast.Sub, operator.sub, operator.sub),
    "*": _Function(ast.Mult, operator.mul, operator.mul),
    "//": _Function(ast.FloorDiv, operator.floordiv, FloorDiv),
    "%": _Function(ast.Mod, operator.mod, _remainder),
    "negative": _Function(ast.USub, operator.neg, operator.neg, 1, 1),
    "max": _Function(None, max, Max, most=_MANY),
    "min": _Function(None, min, Min, most=_MANY),
    "==": _Function(ast.Eq, operator.eq, sympy.Eq, truth=True),
    "!=": _Function(ast.NotEq, operator.ne, sympy.Ne, truth=True),
    "<": _Function(ast.Lt, operator.lt, sympy.Lt, truth=True),
    "<=": _Function(ast.LtE, operator.le, sympy.Le, truth=True),
    ">": _Function(ast.Gt, operator.gt, sympy.Gt, truth=True),
    ">=": _Function(ast.GtE, operator.ge, sympy.Ge, truth=True),
    "not": _Function(ast.Not, operator.not_, sympy.Not, 1, 1, True, True),
    "and": _Function(ast.And, lambda *all_: all(all_), sympy.And, 2, _MANY, True, True),
    "or": _Function(ast.Or, lambda *all_: any(all_), sympy.Or, 2, _MANY, True, True),
}
_WORDS = {function.syntax: word for word, function in _FUNCTIONS.items() if function.syntax}
_DIVIDE = ("//", "%")
_LARGEST, _LONGEST, _DEEPEST = 2**63, 4096, 64


# -- writing ---------------------------------------------------------------------------------------


def tree_of(text: str, names: Mapping[str, str]) -> Tree:
    """A condition that Dynamo has written as Python.

    Args:
        text: it.
        names: what sizes are called in trees, by what Dynamo calls them.

    Raises:
        Unkept: something else is in it.
    """
    try:
        tree = _told(ast.parse(text, mode="eval").body, names)
        checked(tree, frozenset(names.values()))
    except (SyntaxError, RecursionError, Unreadable) as error:
        raise Unkept(f"it has a condition on sizes that cannot be kept: {_short(text)}") from error
    return tree


def _told(node: ast.AST, names: Mapping[str, str]) -> Tree:
    known = names.get(ast.unparse(node))
    if known is not None:
        return known
    match node:
        case ast.Constant(value=int(number)) if type(number) is int:
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _WORDS:
            return [_WORDS[type(op)], _told(left, names), _told(right, names)]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _WORDS:
            return [_WORDS[type(op)], _told(operand, names)]
        case ast.BoolOp(op=op, values=values):
            return [_WORDS[type(op)], *(_told(value, names) for value in values)]
        case ast.Compare(left=left, ops=ops, comparators=rest):
            parts = [left, *rest]
            pairs = zip(ops, parts, rest, strict=False)
            compared = [
                [_WORDS.get(type(op), ""), _told(a, names), _told(b, names)] for op, a, b in pairs
            ]
            return compared[0] if len(compared) == 1 else ["and", *compared]
        case ast.Call(func=ast.Name(id="max" | "min" as word), args=args, keywords=[]):
            return [word, *(_told(arg, names) for arg in args)]
    raise Unkept(f"it has a condition on sizes with {_short(ast.unparse(node))}")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


# -- reading ---------------------------------------------------------------------------------------


def checked(tree: object, names: Container[str], *, truth: bool = True) -> Tree:
    """A tree that somebody has written, if it is one.

    Args:
        tree: anything.
        names: of the sizes that there are.
        truth: whether it has to be true or false, and no number.

    Raises:
        Unreadable: it is none, or uses another name.
    """
    left = _LONGEST

    def check(part: object, truth: bool, depth: int) -> None:
        nonlocal left
        left -= 1
        if depth > _DEEPEST or left < 0:
            raise Unreadable("a condition on sizes is too long")
        if not isinstance(part, list):
            number = type(part) is int and abs(part) < _LARGEST
            name = type(part) is str and part in names
            if truth or not (number or name):
                raise Unreadable("a condition on sizes has something else in it")
            return
        word, *given = part or [None]
        function = _FUNCTIONS.get(word) if type(word) is str else None
        if function is None or not function.least <= len(given) <= function.most:
            raise Unreadable("a condition on sizes calls something else")
        if function.truth is not truth:
            raise Unreadable("a condition on sizes takes numbers for truth")
        if word in _DIVIDE and given[1] == 0:
            raise Unreadable("a condition on sizes divides by zero")
        for item in given:
            check(item, function.truths, depth + 1)

    check(tree, truth, 0)
    return tree


def ordered(trees: Iterable[Tree]) -> list[Tree]:
    """Conditions in an order in which no division by zero is come to; it means: does not hold."""
    found = list(trees)
    divisors = [divisor for tree in found for divisor in _divisors(tree)]
    distinct = {str(divisor): divisor for divisor in divisors if type(divisor) is not int}
    # A divisor that divides itself is asked of from within.
    inner_first = sorted(distinct.values(), key=lambda divisor: len(str(divisor)))
    asked = [["!=", divisor, 0] for divisor in inner_first]
    plain = [tree for tree in found if not any(_divisors(tree))]
    return [*plain, *asked, *(tree for tree in found if any(_divisors(tree)))]


def _divisors(tree: Tree) -> Iterator[Tree]:
    if isinstance(tree, list):
        if tree[0] in _DIVIDE:
            yield tree[2]
        for part in tree[1:]:
            yield from _divisors(part)


def names_in(tree: Tree) -> set[str]:
    """The sizes that a tree is about."""
    if isinstance(tree, list):
        return {name for part in tree[1:] for name in names_in(part)}
    return {tree} if isinstance(tree, str) else set()


def _folded(tree: Tree, leaf: Callable[[int | str], T], made: Callable[[str, list[T]], T]) -> T:
    if not isinstance(tree, list):
        return leaf(tree)
    return made(tree[0], [_folded(part, leaf, made) for part in tree[1:]])


def value_of(tree: Tree, sizes: Mapping[str, int]) -> Any:
    """What a tree is for some sizes."""
    return _folded(
        tree,
        lambda part: sizes[part] if isinstance(part, str) else part,
        lambda word, given: _FUNCTIONS[word].of(*given),
    )


def symbolic(tree: Tree, symbols: Mapping[str, Any]) -> Any:
    """A tree as sympy's, with these symbols for its names."""
    return _folded(
        tree,
        lambda part: symbols[part] if isinstance(part, str) else sympy.Integer(part),
        lambda word, given: _FUNCTIONS[word].symbolic(*given),
    )


def renamed(tree: Tree, names: Mapping[str, str]) -> Tree:
    """A tree with other names."""
    return _folded(
        tree,
        lambda part: names[part] if isinstance(part, str) else part,
        lambda word, given: [word, *given],
    )


def python(tree: Tree, places: Mapping[str, str]) -> str:
    """A tree as Python that reads sizes off places."""

    def made(word: str, given: list[str]) -> str:
        if word in ("max", "min"):
            return f"{word}({', '.join(given)})"
        if word == "negative":
            return f"(-{given[0]})"
        return f"(not {given[0]})" if word == "not" else f"({f' {word} '.join(given)})"

    text = _folded(tree, lambda part: places[part] if isinstance(part, str) else str(part), made)
    return text[1:-1] if isinstance(tree, list) and text.startswith("(") else text
