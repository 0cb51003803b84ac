"""What every form of a matrix offers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """`blocks` products of matrices [m, k] with [k, n]."""

    blocks: int
    m: int
    k: int
    n: int


@dataclass(frozen=True)
class Form(ABC):
    """A matrix W [rows, cols] as a function of factors, which may be trained.

    Attributes:
        rows: outputs of the layer.
        cols: its inputs.
    """

    name: ClassVar[str]

    rows: int
    cols: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """All numbers that make up the form; `of_sizes` is the inverse."""
        return tuple(astuple(self))

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Form:
        """The form of these `sizes`."""
        return cls(*sizes)

    @classmethod
    @abstractmethod
    def of_shapes(cls, rows: int, cols: int, shapes: Sequence[tuple[int, ...]]) -> Form | None:
        """The form [rows, cols] whose factors have these shapes, if there is one."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the factors."""

    @property
    def numbers(self) -> int:
        """How many numbers the factors have."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    @abstractmethod
    def rank(self) -> int:
        """The largest rank of a block in factors; 0 where there is none."""

    @abstractmethod
    def products(self, columns: int) -> list[Product]:
        """The batched products of `multiply`, one after the other."""

    @abstractmethod
    def factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors nearest to a weight [rows, cols], each block in the Frobenius norm.

        Computed in float64, returned in the dtype of the weight; the same every time.
        """

    @abstractmethod
    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """W [rows, cols]."""

    @abstractmethod
    def multiply(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """W x, of a contiguous x [cols, columns]: [rows, columns]."""

    def linear(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """The product x Wᵀ, of x [rows of x, cols]: [rows of x, rows]."""
        return self.multiply(factors, x.mT.contiguous()).mT

    def matmul(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """W x, of x [..., cols, columns]."""
        first = x.movedim(-2, 0)
        result = self.multiply(factors, first.reshape(self.cols, -1))
        return result.view(self.rows, *first.shape[1:]).movedim(0, -2)

    @abstractmethod
    def transposed(self, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """Form and factors of Wᵀ."""

    def __str__(self) -> str:
        return f"{self.name}, rank {self.rank}"
