"""`HMatrix`: blocks over two cluster trees that stand for a matrix, and a bound of the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.blocks import Block, Dense, dense, placed
from graphopt.hierarchical.clusters import ClusterTree


@dataclass(frozen=True, eq=False)
class HMatrix:
    """A matrix in blocks. HODLR, BLR, and H with weak or strong admissibility are all this type.

    Attributes:
        root: its blocks, in the order of positions of both trees.
        rows: clusters of rows.
        columns: clusters of columns.
        bound: an upper bound of the Frobenius norm of the difference to the matrix that it stands
            for, rounding included.
    """

    root: Block
    rows: ClusterTree
    columns: ClusterTree
    bound: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), len(self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Of all entries."""
        block = next(placed(self.root)).block
        return block.values.dtype if isinstance(block, Dense) else block.left.dtype

    @property
    def nbytes(self) -> int:
        """Of all blocks; memory that several of them share counts once."""
        sizes: dict[int, int] = {}
        for place in placed(self.root):
            for tensor in vars(place.block).values():
                if tensor is not None:
                    memory = tensor.untyped_storage()
                    sizes[memory.data_ptr()] = memory.nbytes()
        return sum(sizes.values())

    def dense(self) -> Tensor:
        """[m, n] in the original order; for small matrices and tests."""
        inner = dense(self.root)
        found = torch.empty_like(inner)
        found[self.rows.order.unsqueeze(1), self.columns.order] = inner
        return found
