"""The table of everything that a generated graph can be made of."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from graphopt.testing import ops_arithmetic as arithmetic
from graphopt.testing import ops_layers as layers
from graphopt.testing import ops_shapes as shapes
from graphopt.testing.builder import Builder, Choices

Kind = Callable[[Builder, Choices], Tensor | tuple[Tensor, ...] | None]

KINDS: tuple[Kind, ...] = (
    arithmetic.unary,
    arithmetic.binary,
    arithmetic.with_scalar,
    arithmetic.constant,
    arithmetic.compare_and_select,
    arithmetic.duplicate,
    arithmetic.dropout,
    shapes.reshape,
    shapes.transpose,
    shapes.expand,
    shapes.unsqueeze,
    shapes.cat,
    shapes.split,
    shapes.slicing,
    shapes.copies,
    shapes.cast,
    shapes.reduction,
    layers.linear,
    layers.product,
    layers.convolution,
    layers.batch_norm,
    layers.running_average,
    layers.layer_norm,
    layers.softmax,
    layers.embedding,
    layers.cross_entropy,
)

CATALOGUE: dict[str, Kind] = {kind.__name__: kind for kind in KINDS}
"""Kinds by name; the simple ones first, since hypothesis shrinks towards them."""
