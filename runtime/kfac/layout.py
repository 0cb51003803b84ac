"""Gradients of parameters as the matrices of a block, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphopt.plan.kfac import IN_OUT, IN_OUT_KERNEL, Block


def to_matrix(block: Block, gradients: Mapping[str, Tensor]) -> Tensor:
    """``[groups, rows, columns]`` of a Kronecker block, the bias as one more column.

    Args:
        block: a block of kind ``"kronecker"``.
        gradients: by parameter name, in the parameters' shapes.
    """
    weight = gradients[block.weight]
    if weight.numel() != block.groups * block.rows * block.columns:
        length = _length(block, weight)
        weight = weight.narrow(0, block.start, length)
    groups, rows, columns = block.groups, block.rows, block.columns
    if block.layout == IN_OUT:
        matrix = weight.reshape(groups, columns, rows).transpose(1, 2)
    elif block.layout == IN_OUT_KERNEL:
        kernel = weight[0, 0].numel()
        inputs = columns // kernel
        matrix = weight.reshape(groups, inputs, rows, kernel).transpose(1, 2)
        matrix = matrix.reshape(groups, rows, columns)
    else:
        matrix = weight.reshape(groups, rows, columns)
    if block.bias:
        bias = gradients[block.bias].reshape(groups, rows, 1)
        matrix = torch.cat((matrix, bias.to(matrix.dtype)), 2)
    return matrix


def from_matrix(block: Block, matrix: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_matrix`: parts of a weight in its own rows' shape.

    Args:
        block: the block.
        matrix: ``[groups, rows, columns]``, or one more column with a bias.
        like: gradients that give shapes and dtypes.
    """
    found: dict[str, Tensor] = {}
    groups, rows, columns = block.groups, block.rows, block.columns
    if block.bias:
        bias = like[block.bias]
        found[block.bias] = matrix[:, :, columns].reshape(bias.shape).to(bias.dtype)
        matrix = matrix[:, :, :columns]
    weight = like[block.weight]
    shape = weight.shape
    if weight.numel() != groups * rows * columns:
        shape = torch.Size((_length(block, weight), *shape[1:]))
    if block.layout == IN_OUT:
        matrix = matrix.transpose(1, 2)
    elif block.layout == IN_OUT_KERNEL:
        kernel = weight[0, 0].numel()
        matrix = matrix.reshape(groups, rows, columns // kernel, kernel).transpose(1, 2)
    found[block.weight] = matrix.reshape(shape).to(weight.dtype)
    return found


def _length(block: Block, weight: Tensor) -> int:
    """Rows of the parameter that a block covers."""
    return block.groups * block.rows * block.columns * weight.shape[0] // weight.numel()
