"""Block low rank: equal tiles, dense on the diagonal and of one low rank elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.structured.form import Form, Product
from graphopt.structured.truncate import split


@dataclass(frozen=True)
class Blr(Form):
    """Tiles [m, n] in `tiles` rows and columns; three batched products, one per kind of factor.

    Tile (i, i + d) modulo `tiles` is in slot d - 1 of row i and of its column. Factors: the
    diagonal [tiles, m, n], left [tiles, m, slots, k] by rows and right [tiles, slots, k, n] by
    columns.

    Attributes:
        tiles: along each side.
        k: rank of the tiles off the diagonal.
    """

    name: ClassVar[str] = "blr"

    tiles: int
    k: int

    @classmethod
    def of_shapes(cls, rows: int, cols: int, shapes: Sequence[tuple[int, ...]]) -> Form | None:
        """See `Form`."""
        if len(shapes) != 3 or len(shapes[1]) != 4:
            return None
        return cls(rows, cols, shapes[0][0], shapes[1][3])

    @property
    def m(self) -> int:
        """Rows of a tile."""
        return self.rows // self.tiles

    @property
    def n(self) -> int:
        """Columns of a tile."""
        return self.cols // self.tiles

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `Form`."""
        p, slots = self.tiles, self.tiles - 1
        return (p, self.m, self.n), (p, self.m, slots, self.k), (p, slots, self.k, self.n)

    @property
    def rank(self) -> int:
        """See `Form`."""
        return self.k

    def products(self, columns: int) -> list[Product]:
        """See `Form`."""
        inner = (self.tiles - 1) * self.k
        return [
            Product(self.tiles, self.m, self.n, columns),
            Product(self.tiles, inner, self.n, columns),
            Product(self.tiles, self.m, inner, columns),
        ]

    def tile(self, weight: Tensor, row: int, col: int) -> Tensor:
        """One tile of a matrix."""
        m, n = self.m, self.n
        return weight[row * m : (row + 1) * m, col * n : (col + 1) * n]

    def factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Form`."""
        wide, (diagonal, left, right) = weight.double(), map(weight.double().new_zeros, self.shapes)
        for row in range(self.tiles):
            diagonal[row] = self.tile(wide, row, row)
            for slot in range(self.tiles - 1):
                col = (row + slot + 1) % self.tiles
                left[row, :, slot], right[col, slot] = split(self.tile(wide, row, col), self.k)
        return tuple(f.to(weight.dtype) for f in (diagonal, left, right))

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """See `Form`."""
        diagonal, left, right = factors
        p = self.tiles
        by_slot = [diagonal]
        for slot in range(p - 1):
            by_slot.append(left[:, :, slot] @ right[:, slot].roll(-slot - 1, 0))
        # [row, distance, m, n], then each row of tiles in the order of its columns.
        tiles = torch.stack(by_slot, 1)
        rows = [tiles[row].roll(row, 0).transpose(0, 1).reshape(self.m, -1) for row in range(p)]
        return torch.cat(rows)

    def multiply(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `Form`."""
        diagonal, left, right = factors
        p, slots, columns = self.tiles, self.tiles - 1, x.shape[1]
        parts = x.view(p, self.n, columns)
        inner = torch.bmm(right.reshape(p, slots * self.k, self.n), parts)
        inner = inner.view(p * slots, self.k, columns).index_select(0, self._sources(x.device))
        result = torch.bmm(diagonal, parts)
        left = left.reshape(p, self.m, slots * self.k)
        result = torch.baddbmm(result, left, inner.view(p, slots * self.k, columns))
        return result.view(self.rows, columns)

    def transposed(self, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """Distance d becomes `tiles` - d, so slots turn around."""
        diagonal, left, right = factors
        return Blr(self.cols, self.rows, self.tiles, self.k), (
            diagonal.mT,
            right.flip(1).permute(0, 3, 1, 2),
            left.flip(2).permute(0, 2, 3, 1),
        )

    def _sources(self, device: torch.device) -> Tensor:
        """Where row i finds what its slot d - 1 needs: slot d - 1 of column i + d."""
        rows = torch.arange(self.tiles, device=device)[:, None]
        slots = torch.arange(self.tiles - 1, device=device)
        return ((rows + slots + 1) % self.tiles * (self.tiles - 1) + slots).reshape(-1)

    def __str__(self) -> str:
        return f"{self.name}, {self.tiles} x {self.tiles} tiles, rank {self.k}"
