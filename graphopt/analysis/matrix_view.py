"""How a parameter is a matrix from inputs to outputs, as the operator of its gradient sees it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, cast

import torch
from torch import fx

from graphopt.analysis.weight_readers import kind_of
from graphopt.analysis.weight_uses import Use
from graphopt.graph import value_of

Layout = Literal["out_in", "in_out", "in_out_kernel"]


@dataclass(frozen=True)
class MatrixView:
    """A parameter as linear maps, from `columns` inputs to `rows` outputs each.

    Attributes:
        groups: how many maps lie behind one another: those of a grouped convolution, or of a batch
            of matrices; usually 1.
        rows: outputs.
        columns: inputs; of a convolution, times the points of its kernel.
        layout: how they lie in the parameter: ``"out_in"``, ``"in_out"``, or, in a transposed
            convolution, ``"in_out_kernel"``.
    """

    groups: int
    rows: int
    columns: int
    layout: Layout = "out_in"


def matrix_view(
    use: Use, shape: tuple[int, ...], tangents: frozenset[fx.Node]
) -> MatrixView | None:
    """How a use sees its parameter as a matrix, if it does."""
    kind = kind_of(use.node)
    if kind == "convolution_backward" and use.index == 1:
        kernel: tuple[int, ...] = tuple(value_of(cast("fx.Node", use.node.args[2])).shape)
        groups = cast("int", use.node.args[9])
        if kernel != shape:
            return None
        rows, columns = shape[0] // groups, prod(shape[1:])
        if use.node.args[7]:
            points = rows * prod(shape[2:])
            return MatrixView(groups, shape[1], points, "in_out_kernel")
        return MatrixView(groups, rows, columns)
    if kind == "embedding_dense_backward" and len(shape) == 2:
        return MatrixView(1, shape[1], shape[0], "in_out")
    if kind not in ("mm", "bmm"):
        return None
    *batch, p, q = cast("torch.Tensor", value_of(use.node)).shape
    groups = 1 if use.summed else prod(batch)
    stored = (q, p) if use.transposed else (p, q)
    if len(shape) == 2:
        groups, stored = 1, (shape[0], shape[1])
    if groups * prod(stored) != prod(shape):
        return None
    left = cast("fx.Node", use.node.args[0]) in tangents
    if left != use.transposed:
        return MatrixView(groups, *stored)
    return MatrixView(groups, stored[1], stored[0], "in_out")


def whole_matrix(shape: tuple[int, ...], table: bool) -> MatrixView | None:
    """A parameter of two dimensions as it is, where its gradient does not say how it is used.

    Args:
        shape: of the parameter.
        table: whether it is looked up by index, which is a map from its first dimension.
    """
    if len(shape) != 2:
        return None
    return MatrixView(1, shape[1], shape[0], "in_out") if table else MatrixView(1, *shape)
