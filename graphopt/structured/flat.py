"""W = L R: one low rank for the whole matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.structured.form import Form, Product
from graphopt.structured.truncate import split


@dataclass(frozen=True)
class Flat(Form):
    """Factors L [rows, k] and R [k, cols]; two products.

    Attributes:
        k: the rank.
    """

    name: ClassVar[str] = "flat"

    k: int

    @classmethod
    def of_shapes(cls, rows: int, cols: int, shapes: Sequence[tuple[int, ...]]) -> Form | None:
        """See `Form`."""
        if len(shapes) != 2 or len(shapes[0]) != 2:
            return None
        return cls(rows, cols, shapes[0][1])

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `Form`."""
        return (self.rows, self.k), (self.k, self.cols)

    @property
    def rank(self) -> int:
        """See `Form`."""
        return self.k

    def products(self, columns: int) -> list[Product]:
        """See `Form`."""
        return [
            Product(1, self.k, self.cols, columns),
            Product(1, self.rows, self.k, columns),
        ]

    def factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Form`."""
        return tuple(f.to(weight.dtype).contiguous() for f in split(weight.double(), self.k))

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """See `Form`."""
        left, right = factors
        return left @ right

    def multiply(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `Form`."""
        left, right = factors
        return left @ (right @ x)

    def linear(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Two products in the layout of x, as two linear layers are."""
        left, right = factors
        return (x @ right.mT) @ left.mT

    def matmul(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Without a copy of x."""
        left, right = factors
        return left @ (right @ x)

    def transposed(self, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """See `Form`."""
        left, right = factors
        return Flat(self.cols, self.rows, self.k), (right.mT, left.mT)
