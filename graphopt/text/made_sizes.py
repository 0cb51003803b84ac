"""The symbols of a text as torch's, while its graph is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, statically_known_true
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from graphopt.text.sizes import Size, Symbol, Symbols
from graphopt.text.syntax import TensorType

Known: TypeAlias = Callable[[Any, Mapping[str, Any]], None]
"""States what is known of symbols: told the shape environment, and its symbols by name."""


def nothing_known(shape_env: Any, symbols: Mapping[str, Any]) -> None:
    """Of symbols of which no more is known than their ranges."""


class Made:
    """Sizes of one text.

    Args:
        shape_env: of the fake tensors.
        symbols: that the text declares.
        known: states what else is known of them.

    Attributes:
        symbols: torch's own by the names of the text.
    """

    def __init__(
        self, shape_env: Any, symbols: Sequence[Symbol], known: Known = nothing_known
    ) -> None:
        self.symbols = Symbols()
        self._shape_env = shape_env
        self._own: dict[sympy.Symbol, sympy.Symbol] = {}
        self._hints: dict[sympy.Symbol, int] = {}
        for symbol in symbols:
            positive = symbol.least is not None and symbol.least > 0
            create = shape_env.create_symbol if positive else shape_env.create_unspecified_symbol
            own = create(symbol.hint, ConstantSource(symbol.name), dynamic_dim=DimDynamic.DYNAMIC)
            least = -int_oo if symbol.least is None else symbol.least
            most = int_oo if symbol.most is None else symbol.most
            shape_env.var_to_range[own] = ValueRanges(least, most)
            self.symbols.add(own, symbol)
            self._own[symbol.expression] = own
            self._hints[symbol.expression] = symbol.hint
        known(shape_env, {symbol.name: self._own[symbol.expression] for symbol in symbols})

    def number(self, size: Size) -> torch.SymInt | int:
        """A size of the text as torch has it."""
        if isinstance(size, int):
            return size
        hint = int(size.xreplace(self._hints))
        return self._shape_env.create_symintnode(size.xreplace(self._own), hint=hint)  # type: ignore[no-any-return]

    def numbers(self, sizes: Iterable[Size]) -> list[Any]:
        """Several of them."""
        return [self.number(size) for size in sizes]

    @staticmethod
    def same(one: Any, other: Any) -> bool:
        """Whether two sizes are equal, or were equal in the captured call.

        What makes them equal in all calls (that a size is even, say) is not in the text.
        """
        if statically_known_true(one == other):
            return True
        numbers = [n.node.hint if isinstance(n, torch.SymInt) else n for n in (one, other)]
        return isinstance(other, torch.SymInt) and numbers[0] == numbers[1]

    def reshaped(self, value: Tensor, type_: TensorType) -> Tensor:
        """A tensor with the sizes that are written, where they are its own."""
        if value.dim() != len(type_.shape):
            return value
        shape, stride = self.numbers(type_.shape), self.numbers(type_.stride)
        pairs = zip((*value.shape, *value.stride()), (*shape, *stride), strict=True)
        if not all(self.same(old, new) for old, new in pairs):
            return value
        if [str(n) for n in (*value.shape, *value.stride())] == [str(n) for n in (*shape, *stride)]:
            return value
        return value.as_strided(shape, stride, value.storage_offset())
