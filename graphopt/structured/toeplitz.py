"""W[i, j] = t[i - j + cols - 1]: a long convolution, by the fast Fourier transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.structured.form import Form, Product


@dataclass(frozen=True)
class Toeplitz(Form):
    """One factor, the diagonals t [rows + cols - 1] from the upper right to the lower left.

    The product is a circular convolution of at least rows + cols - 1 points: what wraps around lies
    in front of the results that are kept. It takes place in float32 for shorter types.
    """

    name: ClassVar[str] = "toeplitz"

    @classmethod
    def of_shapes(cls, rows: int, cols: int, shapes: Sequence[tuple[int, ...]]) -> Form | None:
        """See `Form`."""
        return cls(rows, cols) if len(shapes) == 1 else None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `Form`."""
        return ((self.rows + self.cols - 1,),)

    @property
    def rank(self) -> int:
        """See `Form`."""
        return 0

    @property
    def points(self) -> int:
        """Of the transforms: the least product of 2, 3 and 5 that is long enough."""
        return _fast(self.rows + self.cols - 1)

    def products(self, columns: int) -> list[Product]:
        """There are none; see `points`."""
        return []

    def factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The means of the diagonals."""
        diagonals = self._diagonals(weight.device)
        wide = weight.double()
        sums = wide.new_zeros(self.shapes[0]).index_add_(0, diagonals, wide.reshape(-1))
        counts = torch.bincount(diagonals, minlength=self.shapes[0][0])
        return ((sums / counts).to(weight.dtype),)

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """See `Form`."""
        (t,) = factors
        # Row i is the reversed window of t from i on.
        rows: Tensor = t.unfold(0, self.cols, 1).flip(1)
        return rows

    def multiply(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `Form`."""
        return self.linear(factors, x.mT).mT

    def linear(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `Form`."""
        (t,) = factors
        dtype = torch.promote_types(x.dtype, t.dtype)
        wide = dtype if dtype == torch.float64 else torch.float32
        size = self.points
        spectrum = torch.fft.rfft(x.to(wide), size) * torch.fft.rfft(t.to(wide), size)
        result: Tensor = torch.fft.irfft(spectrum, size)
        return result.narrow(-1, self.cols - 1, self.rows).to(dtype)

    def matmul(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `Form`."""
        return self.linear(factors, x.mT).mT

    def transposed(self, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """See `Form`."""
        (t,) = factors
        return Toeplitz(self.cols, self.rows), (t.flip(0),)

    def _diagonals(self, device: torch.device) -> Tensor:
        rows = torch.arange(self.rows, device=device)
        cols = torch.arange(self.cols, device=device)
        return (rows[:, None] - cols + self.cols - 1).reshape(-1)

    def __str__(self) -> str:
        return self.name


def _fast(least: int) -> int:
    size = least
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
