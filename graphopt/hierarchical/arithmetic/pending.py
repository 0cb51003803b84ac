"""Sums of products that are still to be added to a block, and adding them with one truncation.

Products are passed down the tree until they meet a block without children, so that each of those
is truncated once, whatever the number of products (Börm, Christophersen, Kriemann, "Semi-automatic
task graph construction for H-matrix arithmetic", 2019, call it accumulated updates).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.hierarchical.arithmetic.magnitudes import (
    length,
    magnitude,
    pair_magnitude,
    product_error,
    root_of_squares,
)
from graphopt.hierarchical.arithmetic.parts import (
    Span,
    any_tensor,
    apply,
    common,
    factors,
    part,
)
from graphopt.hierarchical.arithmetic.truncation import Pair, joined, truncated, truncated_pair
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, dense, transposed
from graphopt.hierarchical.rounding import gamma, norm

# Products up to this size are formed entry by entry: below it recursion costs more than it saves.
SMALL = 256
# Terms of sums up to which dense products are put side by side.
_ABREAST = 128


@dataclass(frozen=True)
class Product:
    """``sign * left @ right`` for blocks [m, k] and [k, n]."""

    left: Block
    right: Block
    sign: float = 1.0


@dataclass(frozen=True)
class Pending:
    """What is still to be added to a block.

    Attributes:
        products: of blocks.
        pairs: low-rank terms.
    """

    products: tuple[Product, ...] = ()
    pairs: tuple[Pair, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.products or self.pairs)

    def plus(self, *products: Product) -> Pending:
        """With more products."""
        return replace(self, products=self.products + products)

    def within(self, rows: Span, columns: Span) -> Pending:
        """What concerns a rectangle; products of grids become those of their blocks."""
        pairs = tuple((u[slice(*rows)], v[slice(*columns)]) for u, v in self.pairs)
        return Pending(
            tuple(p for whole in self.products for p in _cut(whole, rows, columns)), pairs
        )

    def transposed(self) -> Pending:
        """The same for the transposed block."""
        return Pending(
            tuple(Product(transposed(p.right), transposed(p.left), p.sign) for p in self.products),
            tuple((v, u) for u, v in self.pairs),
        )


def fill(target: Block, pending: Pending, tolerance: float) -> tuple[Block, float]:
    """``target`` with everything pending added, in the form of `target`.

    Args:
        target: [m, n].
        pending: for that shape.
        tolerance: how much each low-rank block may lose by truncation, absolute (Frobenius).

    Returns:
        The block, and a bound of the Frobenius norm of its error: truncation as it was measured,
        and rounding. Low-rank blocks that would need more memory than a dense one become dense.
    """
    if not pending:
        return target, 0.0
    if isinstance(target, Grid):
        pending, error = settled(pending)
        lines, errors = [], []
        for i, rows in enumerate(target.row_spans):
            line = []
            for j, columns in enumerate(target.column_spans):
                block, lost = fill(target.blocks[i][j], pending.within(rows, columns), tolerance)
                line.append(block)
                errors.append(lost)
            lines.append(tuple(line))
        return Grid(tuple(lines)), error + root_of_squares(errors)
    if isinstance(target, Dense):
        return _filled(target, pending)
    hard = sum(not _simple(p) for p in pending.products)
    share = tolerance / 2 if hard else tolerance
    pairs, errors = [factors(target), *pending.pairs], []
    for product in pending.products:
        pair, lost = low_rank(product, share / max(hard, 1))
        pairs.append(pair)
        errors.append(lost)
    block, lost = truncated(pairs, share)
    return block, sum(errors) + lost


def settled(pending: Pending) -> tuple[Pending, float]:
    """Products with a low-rank factor become one more low-rank term; and what that loses."""
    new: list[Pair] = []
    rest, error = [], 0.0
    for product in pending.products:
        if isinstance(product.left, LowRank) or isinstance(product.right, LowRank):
            pair, lost = low_rank(product, 0.0)
            new.append(pair)
            error += lost
        else:
            rest.append(product)
    new = [pair for pair in new if pair[0].shape[1]]
    pairs = (*pending.pairs, joined(new)) if new else pending.pairs
    return Pending(tuple(rest), pairs), error


def low_rank(product: Product, tolerance: float) -> tuple[Pair, float]:
    """A product of blocks as a low-rank term, and a bound of its error.

    Only a product of two large grids is truncated, within `tolerance`, absolute.
    """
    left, right, sign = product.left, product.right, product.sign
    if isinstance(left, LowRank):
        u, v = factors(left)
        if not u.shape[1]:
            return (u, v.new_zeros(right.shape[1], 0)), 0.0
        return (sign * u, apply(right, v, transpose=True)), _lost(left, right)
    if isinstance(right, LowRank):
        u, v = factors(right)
        if not u.shape[1]:
            return (u.new_zeros(left.shape[0], 0), v), 0.0
        return (sign * apply(left, u), v), _lost(left, right)
    (m, k), n = left.shape, right.shape[1]
    if isinstance(left, Grid) and isinstance(right, Grid) and max(m, k, n) > SMALL:
        return _merged(product, tolerance)
    if isinstance(left, Dense) and k <= min(m, n):
        return (sign * left.values, dense(right).T), forming_error(right) * magnitude(left)
    if isinstance(right, Dense) and k <= min(m, n):
        return (sign * dense(left), right.values.T), forming_error(left) * magnitude(right)
    if m <= n:
        values = sign * apply(right, dense(left).T, transpose=True)
        return (torch.eye(m).to(values), values), _lost(left, right)
    values = sign * apply(left, dense(right))
    return (values, torch.eye(n).to(values)), _lost(left, right)


def forming_error(block: Block) -> float:
    """A bound of what `blocks.dense` of a block loses by rounding."""
    if isinstance(block, Dense):
        return 0.0
    return gamma(length(block), any_tensor(block).dtype) * magnitude(block)


# -- helpers ---------------------------------------------------------------------------------------


def _simple(product: Product) -> bool:
    """Whether `low_rank` does not truncate it."""
    grids = isinstance(product.left, Grid) and isinstance(product.right, Grid)
    return not (grids and max(*product.left.shape, product.right.shape[1]) > SMALL)


def _cut(product: Product, rows: Span, columns: Span) -> list[Product]:
    found = _blocks(product, rows, columns)
    if found is not None:
        return found
    inner = (0, product.left.shape[1])
    left, right = part(product.left, rows, inner), part(product.right, inner, columns)
    if not (isinstance(left, Grid) and isinstance(right, Grid)):
        return [Product(left, right, product.sign)]
    found = []
    for span in common(left.column_spans, right.row_spans):
        a = part(left, (0, left.shape[0]), span)
        b = part(right, span, (0, right.shape[1]))
        if not (_nothing(a) or _nothing(b)):
            found.append(Product(a, b, product.sign))
    return found


def _blocks(product: Product, rows: Span, columns: Span) -> list[Product] | None:
    """The products of the blocks themselves, if two grids are cut there."""
    left, right = product.left, product.right
    if not (isinstance(left, Grid) and isinstance(right, Grid)):
        return None
    if not (rows in left.row_spans and columns in right.column_spans):
        return None
    if left.column_spans != right.row_spans:
        return None
    j = right.column_spans.index(columns)
    line, column = left.blocks[left.row_spans.index(rows)], [own[j] for own in right.blocks]
    return [
        Product(a, b, product.sign)
        for a, b in zip(line, column, strict=True)
        if not (_nothing(a) or _nothing(b))
    ]


def _nothing(block: Block) -> bool:
    return isinstance(block, LowRank) and not block.rank


def _lost(left: Block, right: Block) -> float:
    return product_error(left, right, any_tensor(left).dtype)


def _filled(target: Dense, pending: Pending) -> tuple[Dense, float]:
    """A dense block with everything added, and what rounding loses."""
    values, count = target.values, len(pending.products) + len(pending.pairs)
    size, error = norm(values), 0.0
    for u, v in pending.pairs:
        values = torch.addmm(values, u, v.T)
        grown = pair_magnitude(u, v)
        size, error = size + grown, error + gamma(u.shape[1], u.dtype) * grown
    for product in pending.products:
        left, right = product.left, product.right
        size += magnitude(left) * magnitude(right)
        error += _lost(left, right)
    for product in pending.products:
        left, right = product.left, product.right
        if isinstance(right, Dense) and not isinstance(left, Dense):
            values = values + product.sign * apply(left, right.values)
        elif isinstance(left, Dense) and not isinstance(right, Dense):
            values = values + product.sign * apply(right, left.values.T, transpose=True).T
        elif not isinstance(left, Dense):
            values = values + product.sign * apply(left, dense(right))
    for first, second in _side_by_side(pending.products):
        values = torch.addmm(values, first, second)
    count += _ABREAST  # so many terms of other products may be in the sum of one
    return Dense(values), error + gamma(count, values.dtype) * (size + error)


def _side_by_side(products: tuple[Product, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors [m, k] and [k, n] of several products of dense blocks at once."""
    left: list[Tensor] = []
    right: list[Tensor] = []
    for product in products:
        if not (isinstance(product.left, Dense) and isinstance(product.right, Dense)):
            continue
        left.append(product.sign * product.left.values)
        right.append(product.right.values)
        if sum(v.shape[1] for v in left) > _ABREAST:
            yield torch.cat(left, 1), torch.cat(right)
            left, right = [], []
    if left:
        yield torch.cat(left, 1), torch.cat(right)


def _merged(product: Product, tolerance: float) -> tuple[Pair, float]:
    """Of two grids: block by block, then block rows, then all; half of the tolerance each."""
    left, right = product.left, product.right
    assert isinstance(left, Grid)
    assert isinstance(right, Grid)
    rows, columns = left.row_spans, right.column_spans
    whole = Pending((product,))
    each = tolerance / (2 * math.sqrt(len(rows) * len(columns)))
    lines: list[Pair] = []
    first, second = [], []
    for r in rows:
        found: list[Pair] = []
        for c in columns:
            block, lost = fill(_zero(r, c, left), whole.within(r, c), each)
            first.append(lost)
            u, v = factors(block) if isinstance(block, LowRank) else _exact(block)
            wide = v.new_zeros(right.shape[1], v.shape[1])
            wide[slice(*c)] = v
            found.append((u, wide))
        u, v, lost = truncated_pair(*joined(found), tolerance / (2 * math.sqrt(len(rows))))
        second.append(lost)
        tall = u.new_zeros(left.shape[0], u.shape[1])
        tall[slice(*r)] = u
        lines.append((tall, v))
    return joined(lines), root_of_squares(first) + root_of_squares(second)


def _zero(rows: Span, columns: Span, like: Block) -> LowRank:
    some = any_tensor(like)
    return LowRank(some.new_zeros(rows[1] - rows[0], 0), some.new_zeros(columns[1] - columns[0], 0))


def _exact(block: Block) -> Pair:
    values = dense(block)
    m, n = values.shape
    if m <= n:
        return torch.eye(m).to(values), values.T
    return values, torch.eye(n).to(values)
