"""How large blocks are, and what a product of them loses by rounding.

A sum of k products in any order is wrong by at most ``gamma(k) |a|.|b|``; the norms of absolute
values that this needs are bounded by `magnitude`.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from graphopt.hierarchical.blocks import Block, Dense, LowRank
from graphopt.hierarchical.rounding import gamma, norm

_magnitudes: WeakKeyDictionary[Block, float] = WeakKeyDictionary()


def magnitude(block: Block) -> float:
    """At least the Frobenius norm of the absolute values that products with `block` add up."""
    known = _magnitudes.get(block)
    if known is None:
        if isinstance(block, Dense):
            known = norm(block.values)
        elif isinstance(block, LowRank):
            known = (
                pair_magnitude(block.left, block.right)
                if block.core is None
                else norm(block.left) * norm(block.core) * norm(block.right)
            )
        else:
            known = math.hypot(*(magnitude(b) for line in block.blocks for b in line))
        _magnitudes[block] = known
    return known


def pair_magnitude(left: Tensor, right: Tensor) -> float:
    """The sum of the norms of the terms of ``left @ right.T``, column by column."""
    found = column_norms(left) @ column_norms(right)
    return float(found) * (1 + 1e-12)


def column_norms(values: Tensor) -> Tensor:
    """[k] in float64, for [m, k]."""
    found: Tensor = torch.linalg.vector_norm(values.detach(), dim=0, dtype=torch.float64)
    return found


def length(block: Block) -> int:
    """The most operations one after the other for an entry of ``block @ x``."""
    if isinstance(block, Dense):
        return block.shape[1]
    if isinstance(block, LowRank):
        inner = 0 if block.core is None else block.core.shape[0]
        return block.shape[1] + block.right.shape[1] + inner
    return max(max(length(b) for b in line) + len(line) for line in block.blocks)


def product_error(left: Block, right: Block, dtype: torch.dtype) -> float:
    """Of one product of two blocks by `parts.apply`, Frobenius."""
    count = length(left) + length(right)
    return gamma(count, dtype) * magnitude(left) * magnitude(right)


def root_of_squares(errors: list[float]) -> float:
    """The norm of a matrix whose disjoint parts have these norms."""
    return math.hypot(*errors) if errors else 0.0
