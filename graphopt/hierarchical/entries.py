"""A matrix whose entries can be asked for, in blocks found by adaptive cross approximation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.admissibility import Admissibility, Partition, Weak, partition
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.compress import recompress
from graphopt.hierarchical.kernel_sides import chunks
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.packed import Blocks
from graphopt.hierarchical.rounding import gamma, storage

_DOUBLE = torch.float64
# Random vectors of a check by products, and the probability with which it may be wrong.
_PROBES, _FAILURE = 32, 1e-6

Entries = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]


def from_entries(
    entries: Entries,
    rows: ClusterTree,
    columns: ClusterTree | None = None,
    *,
    tolerance: float = 1e-6,
    rule: Admissibility | None = None,
    dtype: torch.dtype = _DOUBLE,
    product: Product | None = None,
) -> HMatrix:
    """A matrix from some of its rows and columns, checked on all of it.

    Cross approximation reads a few rows and columns of a block, and misses what they do not show:
    so every block is compared with all its entries, evaluated in pieces and never kept, and is
    continued from the row that was missed. Where a product of the whole matrix is given, it takes
    the place of that: products with random vectors bound the error with probability 1 - 1e-6, and
    only if they show that something was missed are the entries compared.

    Args:
        entries: maps original indices of rows [a] and columns [b] to [a, b].
        rows: clusters of rows.
        columns: clusters of columns; None for those of the rows.
        tolerance: of the Frobenius norm of the error, relative to that of the matrix.
        rule: which blocks are of low rank; None for `Weak`.
        dtype: what values are stored in.
        product: maps [n, q] in float64 and the original order to the product of the matrix, exact
            to rounding.

    Returns:
        A matrix on the CPU, wherever entries are.

    Raises:
        ArgumentError: entries that are not finite, or a tolerance below what the dtype reaches.
    """
    other = rows if columns is None else columns
    if not 0 < tolerance < 1:
        raise ArgumentError(f"a tolerance of {tolerance}", hint="pass one between 0 and 1")
    if dtype not in (torch.float32, _DOUBLE):
        raise ArgumentError(f"blocks cannot be stored in {dtype}", hint="pass torch.float32")
    covered = partition(rows, other, rule or Weak())
    read = _checked(entries)
    size = _guess(read, len(rows), len(other))
    for exact in (product is None, True, True, True):
        aim = tolerance * size * (0.9 if exact else 0.3)
        bound, blocks = _build(read, covered, aim, dtype, exact)
        matrix = HMatrix(None, rows, other, bound, blocks.packed())
        if not exact and product is not None:
            matrix.bound, matrix.confidence = _probed(product, matrix), 1 - _FAILURE
        norm = matrix.norm * (1 - max(1e-9, 64 * storage(dtype))) - matrix.bound
        if matrix.bound <= tolerance * norm or matrix.bound == 0:
            return matrix
        if exact:
            size = min(0.7 * size, norm) if norm > 0 else 0.1 * size
    raise ArgumentError(
        f"a relative error of {tolerance:.1e} is out of reach of {dtype}: "
        f"{matrix.bound / matrix.norm:.1e} was reached",
        hint="pass a larger tolerance, or dtype=torch.float64",
    )


class Cross:
    """A sum of outer products that agrees with a block in the rows and columns that were read.

    Partial pivoting: Bebendorf, Approximation of boundary element matrices, 2000.

    Args:
        entries: maps rows and columns *of the block* to values.
        shape: of the block.
        most: columns that the factors may have.
    """

    def __init__(self, entries: Entries, shape: tuple[int, int], most: int) -> None:
        self._entries = entries
        self._rows, self._columns = (torch.arange(size) for size in shape)
        self._left = torch.empty(shape[0], most, dtype=_DOUBLE)
        self._right = torch.empty(shape[1], most, dtype=_DOUBLE)
        self.used = torch.zeros(shape[0], dtype=torch.bool)
        self.rank = 0

    @property
    def left(self) -> Tensor:
        """[m, k]."""
        return self._left[:, : self.rank]

    @property
    def right(self) -> Tensor:
        """[n, k]."""
        return self._right[:, : self.rank]

    @property
    def full(self) -> bool:
        """Whether there is no room for another column, or no row is left."""
        return self.rank == self._left.shape[1] or bool(self.used.all())

    def extend(self, row: int, tolerance: float) -> None:
        """Add terms, the first from a row, until three together are smaller than a tolerance."""
        small = 0
        while small < 3 and not self.full:
            self.used[row] = True
            across = self._entries(self._rows[row : row + 1], self._columns)[0].double()
            across = across - self.right @ self._left[row, : self.rank]
            column = int(across.abs().argmax())
            pivot = float(across[column])
            if pivot == 0:
                small += 1
                row = int((~self.used).double().argmax())
                continue
            down = self._entries(self._rows, self._columns[column : column + 1])[:, 0].double()
            down = (down - self.left @ self._right[column, : self.rank]) / pivot
            self._left[:, self.rank], self._right[:, self.rank] = down, across
            self.rank += 1
            size = float(down.norm() * across.norm())
            small = small + 1 if size <= tolerance else 0
            row = int(torch.where(self.used, -1.0, down.abs()).argmax())


def _build(
    entries: Entries, covered: Partition, aim: float, dtype: torch.dtype, exact: bool
) -> tuple[float, Blocks]:
    rows, columns = covered.rows, covered.columns
    blocks, squares = Blocks(rows, columns), 0.0
    share = aim / math.sqrt(max(1, sum(len(pairs) for pairs in covered.far)))
    for pairs in (*covered.far, covered.near):
        own, other = (rows.starts[pairs.row_level], columns.starts[pairs.column_level])
        for row, column in zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True):
            i = rows.order[own[row] : own[row + 1]]
            j = columns.order[other[column] : other[column + 1]]
            place = pairs.row_level, row, pairs.column_level, column
            found = None
            if pairs is not covered.near:
                found = _low_rank(_inner(entries, i, j), (len(i), len(j)), share, dtype, exact)
            if found is None:
                values = entries(i, j).double()
                stored = values.to(dtype)
                error = float((values - stored.double()).norm())
                blocks.dense(*place, stored)
            else:
                left, right, error = found
                blocks.low_rank(*place, left, right)
            squares += error**2
    return math.sqrt(squares) * (1 + 1e-12), blocks


def _inner(entries: Entries, i: Tensor, j: Tensor) -> Entries:
    return lambda rows, columns: entries(i[rows], j[columns])


def _low_rank(
    entries: Entries, shape: tuple[int, int], share: float, dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor, float] | None:
    """Factors within an error, and that error; None if they would not be smaller than the block.

    The error is measured if `exact`, and infinite elsewhere only where it cannot be known.
    """
    most = max(1, math.prod(shape) // sum(shape))
    cross = Cross(entries, shape, most)
    row, stop = 0, share / 4
    while True:
        cross.extend(row, stop)
        left, right, error = recompress(cross.left, cross.right, share / 2)
        left, right = left.to(dtype), right.to(dtype)
        if not exact:
            return None if cross.full else (left, right, error)
        error, row = _residual(entries, shape, left, right, cross.used)
        if error <= share:
            return left, right, error
        if cross.full:
            return None
        stop /= 2


def _residual(
    entries: Entries, shape: tuple[int, int], left: Tensor, right: Tensor, used: Tensor
) -> tuple[float, int]:
    """A bound of the Frobenius norm of the difference, and the unused row that differs most."""
    left, right = left.double(), right.double()
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    differences, sizes = [], []
    for part in chunks(shape[0], shape[1]):
        values = entries(rows[part], columns).double()
        differences.append((values - left[part] @ right.T).norm(dim=1))
        sizes.append(values.norm(dim=1))
    difference = torch.cat(differences)
    lost = gamma(left.shape[1] + 2, _DOUBLE)
    error = float(difference.norm()) * (1 + gamma(math.prod(shape) + 2, _DOUBLE))
    error += 1.01 * lost * float(torch.cat(sizes).norm() + left.norm() * right.norm())
    return error, int(torch.where(used, -1.0, difference).argmax())


def _checked(entries: Entries) -> Entries:
    """The same on the CPU, refused where they are not finite or have another shape."""

    def read(rows: Tensor, columns: Tensor) -> Tensor:
        values = entries(rows, columns).cpu()
        if values.shape != (len(rows), len(columns)):
            raise ArgumentError(
                f"entries of {len(rows)} rows and {len(columns)} columns are {tuple(values.shape)}",
                hint="return a tensor of [rows, columns]",
            )
        if not bool(values.isfinite().all()):
            raise ArgumentError("entries are not finite", hint="remove or mend them")
        return values

    return read


def _guess(entries: Entries, m: int, n: int) -> float:
    """Of the Frobenius norm, from a random grid of entries."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator)[:256] for size in (m, n))
    values = entries(rows, columns)
    return float(values.double().square().mean().sqrt()) * math.sqrt(m * n) or 1.0


def _probed(product: Product, matrix: HMatrix) -> float:
    """A bound of the Frobenius norm of the error that holds with probability 1 - 1e-6.

    For a Gaussian vector w, norm(R w)^2 is a sum of squares of independent normal numbers, weighted
    by the squares of R's singular values. So E exp(-s norm(R w)^2) is the product of
    (1 + 2 s sigma_i^2)^(-1/2), which is at most (1 + 2 s norm(R)_F^2)^(-1/2), and by Markov's
    inequality the mean of q of them is below t norm(R)_F^2 with a probability of at most
    (t exp(1 - t))^(q / 2).
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(matrix.shape[1], _PROBES, generator=generator, dtype=_DOUBLE)
    approximate = (matrix @ noise.to(matrix.dtype)).double()
    left = (product(noise).cpu() - approximate).norm(dim=0) + matrix.packed.rounding * noise.norm(
        dim=0
    )
    if matrix.dtype is not _DOUBLE:
        left = left + matrix.norm * storage(matrix.dtype) * noise.norm(dim=0)
    goal, low, high = _FAILURE ** (2 / _PROBES), 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.exp(1 - middle) < goal else (low, middle)
    return float(left.square().mean().sqrt()) / math.sqrt(low)
