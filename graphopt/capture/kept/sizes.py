"""Sizes that are symbols of a kept graph: where they are in a call, and what must hold for them.

The conditions are those that Dynamo guards with, taken from what it writes, so that they hold for
the same sizes in both processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.guards import ShapeCodeParts
from torch._dynamo.source import TensorProperty, TensorPropertySource
from torch._guards import Source
from torch.fx.experimental.symbolic_shapes import _ShapeGuardsHelper

from graphopt.capture.kept.expressions import (
    Tree,
    checked,
    names_in,
    ordered,
    python,
    renamed,
    symbolic,
    tree_of,
    value_of,
)
from graphopt.capture.kept.sources import Misfit, Unreadable, Writer, reader
from graphopt.capture.sizes import Size
from graphopt.graph import Graph
from graphopt.plan import Role
from graphopt.text.sizes import Symbols


@dataclass(frozen=True)
class Varying:
    """The symbols of a captured call.

    Attributes:
        shape_env: of the capture, once nothing more is asked of it.
        inputs: where each input of the graph is that is a size; ``None`` for the others.
        sizes: what became of those that were to be symbols, each with where it is.
        read: where those are that are symbols; of equal ones, the first.
    """

    shape_env: Any
    inputs: Sequence[Source | None]
    sizes: Sequence[tuple[Size, Source]]
    read: Sequence[Source]


# -- writing ---------------------------------------------------------------------------------------


def sizes_data(varying: Varying, writer: Writer) -> dict[str, Any]:
    """The symbols of a call as data.

    Raises:
        Unkept: Dynamo asks something of them that is no data.
    """
    texts, places = _asked(varying.shape_env)
    names: dict[str, str] = {}
    for name, source in places.items():
        if any(name in text for text in texts):
            names[name] = str(writer.add(source))
    return {
        "conditions": [tree_of(text, names) for text in texts],
        "named": [
            [size.name, writer.add(source), size.least, size.most, size.line]
            for size, source in varying.sizes
        ],
        "read": [writer.add(source) for source in varying.read],
    }


def _asked(shape_env: Any) -> tuple[list[str], dict[str, Source]]:
    """What Dynamo's guards ask of sizes, as Python; and what it may call each of them."""
    tracked = shape_env.tracked_fakes or []
    (asked,) = shape_env.produce_guards_verbose(
        [each.fake for each in tracked],
        [each.source for each in tracked],
        input_contexts=[each.symbolic_context for each in tracked],
        langs=("python",),
    )
    places = {}
    for each in tracked:
        for source in _places(each.fake, each.source):
            places[source.name] = source
    return asked.exprs, places


def _places(fake: Any, source: Source) -> list[Source]:
    """The numbers of one input that may be symbols."""
    if not isinstance(fake, Tensor):
        return [source]
    numbers = (*fake.shape, *fake.stride(), fake.storage_offset())
    if not any(isinstance(number, torch.SymInt) for number in numbers):
        return []
    parts = (TensorProperty.SIZE, TensorProperty.STRIDE)
    found = [TensorPropertySource(source, p, i) for p in parts for i in range(fake.dim())]
    return [*found, TensorPropertySource(source, TensorProperty.STORAGE_OFFSET)]


def form_of(numbers: Sequence[Any]) -> list[int | None]:
    """Sizes or strides, without those that are symbols."""
    return [n.node.maybe_as_int() if isinstance(n, torch.SymInt) else int(n) for n in numbers]


def relations(data: Mapping[str, Any], inputs: Sequence[int], graph: Graph) -> list[Tree]:
    """Conditions on symbols by the names that the text of a graph has for them.

    Args:
        data: of the sizes.
        inputs: the place of each input of the graph.
        graph: it.
    """
    symbols = Symbols()
    names: dict[str, str] = {}
    for node in graph.inputs:
        symbols.note(node.meta.get("val"))
    for place, node in zip(inputs, graph.inputs, strict=False):
        value = node.meta.get("val")
        size = symbols.expression(value) if isinstance(value, torch.SymInt) else None
        if size is not None and not isinstance(size, int) and size.is_Symbol:
            names[str(place)] = size.name
    trees = [tree for tree in data["conditions"] if names_in(tree) <= names.keys()]
    return [renamed(tree, names) for tree in trees]


# -- reading ---------------------------------------------------------------------------------------


class Sizes:
    """The symbols of a kept capture.

    Args:
        data: as `sizes_data` has made it, or anything else.
        source: finds the place with a number.
        tensors: the places that are certainly tensors.

    Attributes:
        places: of all sizes.

    Raises:
        Unreadable: it is something else.
    """

    def __init__(
        self, data: Any, source: Callable[[object], Source], tensors: frozenset[Source]
    ) -> None:
        parts = ("conditions", "named", "read")
        if not isinstance(data, dict) or not all(isinstance(data.get(p), list) for p in parts):
            raise Unreadable("it does not say what sizes it is for")
        self._named = [_named(row) for row in data["named"]]
        self._read = data["read"]
        trees = data["conditions"]
        written = {name for tree in trees for name in _names(tree)}
        self.places: dict[int, Source] = {}
        for place in (*map(_number, written), *self._read, *(row[1] for row in self._named)):
            found = source(place)
            if not isinstance(found, TensorPropertySource) or found.base not in tensors:
                raise Unreadable("a size of nothing")
            self.places[place] = found
        self._conditions = ordered(checked(tree, written) for tree in trees)

    def compare(self, values: Mapping[int, Any]) -> None:
        """Raise `Misfit` where the conditions do not hold for sizes by place."""
        sizes = {str(place): values[place] for place in self.places}
        for tree in self._conditions:
            if not value_of(tree, sizes):
                raise Misfit(f"sizes are others: {self._python(tree)}")

    def guard(self) -> ShapeCodeParts:
        """The conditions as Dynamo has them."""
        texts = _ShapeGuardsHelper([self._python(tree) for tree in self._conditions])
        return ShapeCodeParts(texts, texts, None, python_fallback=True, shape_env_sources=[])

    def _python(self, tree: Tree) -> str:
        return python(tree, {str(place): source.name for place, source in self.places.items()})

    def named(self, values: Mapping[int, Any]) -> tuple[Size, ...]:
        """What became of the sizes that were to be symbols."""
        return tuple(
            Size(name, values[place], least, most, line)
            for name, place, least, most, line in self._named
        )

    def reading(self, scope: dict[str, Any]) -> Callable[[dict[str, object]], tuple[int, ...]]:
        """Reads the sizes that are symbols off a call's variables."""
        read = reader([self.places[place] for place in self._read])
        return lambda variables: read(variables, scope)


def _named(row: Any) -> tuple[str, int, int, int | None, str]:
    kinds = [type(part) for part in row] if isinstance(row, list) else []
    if kinds not in ([str, int, int, int, str], [str, int, int, type(None), str]):
        raise Unreadable("a size without a range")
    if not names_size(row[0]):
        raise Unreadable("a size without a name")
    return tuple(row)


def names_size(name: object) -> bool:
    """Whether something names a dimension of an argument (``"batch.ids.1"``)."""
    number = name.rpartition(".")[2] if isinstance(name, str) else ""
    return number.isascii() and number.isdecimal() and len(number) < 4


def _names(tree: Any) -> set[str]:
    """Of a tree that may be none."""
    found: set[str] = set()
    left = [tree]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part[1:]
        elif isinstance(part, str):
            found.add(part)
    return found


def _number(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) < 10):
        raise Unreadable("a condition on sizes has something else in it")
    return int(name)


class Symbolic:
    """What is known of the symbols of a text that is being read.

    Args:
        trees: conditions by the names of the text, or anything else.

    Attributes:
        shape_env: torch's, once the text was read; ``None`` where it has no symbols.
        stated: how many of its guards say what was known.
    """

    def __init__(self, trees: Any) -> None:
        if not isinstance(trees, list):
            raise Unreadable("it does not say what holds for its symbols")
        self.shape_env: Any = None
        self.stated = 0
        self._trees = trees

    def __call__(self, shape_env: Any, symbols: Mapping[str, Any]) -> None:
        """State it."""
        for tree in self._trees:
            if not bool(shape_env.evaluate_expr(symbolic(checked(tree, symbols), symbols))):
                raise Unreadable("its sizes are not within their conditions")
        if symbols:
            self.shape_env, self.stated = shape_env, len(shape_env.guards)


def symbols_of(graph: Graph) -> dict[Any, int]:
    """Torch's symbols of a graph by the input that each is."""
    found: dict[Any, int] = {}
    for position, (node, slot) in enumerate(zip(graph.inputs, graph.signature.inputs, strict=True)):
        value = node.meta["val"]
        if slot.role is Role.SIZE and isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found.setdefault(value.node.expr, position)
    return found


def fits(value: Any, given: Any, sizes: Mapping[Any, int]) -> bool:
    """Whether an input of a call has the form that its graph says, with sizes by symbol."""

    def number(one: Any) -> Any:
        return one.node.expr.xreplace(sizes) if isinstance(one, torch.SymInt) else one

    if isinstance(value, Tensor) and isinstance(given, Tensor):
        numbers = [number(n) for n in (*value.shape, *value.stride())]
        return value.dtype == given.dtype and numbers == [*given.shape, *given.stride()]
    return type(given) is int and not isinstance(value, Tensor) and bool(number(value) == given)
