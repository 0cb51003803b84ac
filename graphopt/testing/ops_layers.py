"""Layers that generated graphs are made of, with their parameters and buffers.

Each function reads its decisions from `Choices`, takes operands from the `Builder` and returns the
values that it made. Functions of `torch` stand for the ATen operators that they dispatch to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.testing.builder import Builder, Choices, is_fixed, least, numel
from graphopt.testing.recording import aten


def is_float32(value: Tensor) -> bool:
    """Whether layers that want one dtype throughout can read `value`."""
    return value.dtype is torch.float32


def _features(value: Tensor, rank: int) -> bool:
    """Whether a parameter can have the last size of a tensor of at least this rank."""
    return value.ndim >= rank and is_fixed(value.shape[-1])


def _enough(value: Tensor) -> bool:
    """Whether a channel has more than one value."""
    return numel(value) > value.shape[1]


def _are_examples(value: Tensor) -> bool:
    """Whether rows are as many as an input has: not sizes computed in the graph."""
    rows: Any
    rows, classes = value.shape
    simple = not isinstance(rows, torch.SymInt) or rows.node.expr.is_Symbol
    return simple and is_fixed(classes)


def linear(b: Builder, c: Choices) -> Tensor:
    """A linear layer, in bfloat16 where its input is."""
    value = b.value(c, lambda v: _features(v, 2) and v.dtype is not torch.float64)
    size = c.integer(1, 4)
    weight = b.param("weight", (size, value.shape[-1]), c)
    bias = b.param("bias", (size,), c) if c.flag() else None
    return F.linear(value, weight.to(value.dtype), bias if bias is None else bias.to(value.dtype))


def product(b: Builder, c: Choices) -> Tensor:
    """A matrix times its own transpose, single or batched."""
    value = b.value(c, lambda v: v.ndim in (2, 3) and is_float32(v))
    return torch.matmul(value, torch.transpose(value, -2, -1))


def convolution(b: Builder, c: Choices) -> Tensor:
    """A convolution over images of at least one pixel."""
    value = b.value(
        c, lambda v: v.ndim == 4 and is_float32(v) and is_fixed(v.shape[1]), fresh=(2, 2, 4, 4)
    )
    size = c.integer(1, min(3, *map(least, value.shape[2:])))
    weight = b.param("weight", (c.integer(1, 3), value.shape[1], size, size), c)
    bias = b.param("bias", weight.shape[:1]) if c.flag() else None
    return F.conv2d(value, weight, bias, padding=c.integer(0, 1))


def batch_norm(b: Builder, c: Choices) -> Tensor:
    """Batch norm: in training it renews its running statistics, a mutation of the step."""
    value = b.value(
        c,
        lambda v: v.ndim in (2, 4) and is_float32(v) and is_fixed(v.shape[1]) and _enough(v),
        (2, 3),
    )
    features = value.shape[1:2]
    weight, bias = b.param("weight", features), b.param("bias", features)
    mean, var = b.buffer("running_mean", features), b.buffer("running_var", features)
    result: Tensor
    if not b.training:
        operator = aten._native_batch_norm_legit_no_training.default
        result = operator(value, weight, bias, mean, var, 0.1, 1e-5)[0]
        return result
    if c.flag():
        count = b.buffer("num_batches_tracked", (), torch.int64)
        b.mutate(count, torch.add(count, 1))
    operator = aten._native_batch_norm_legit.default
    result = operator(value, weight, bias, mean, var, True, 0.1, 1e-5)[0]
    return result


def running_average(b: Builder, c: Choices) -> Tensor | None:
    """A buffer that follows the mean of a value."""
    value = torch.detach(b.value(c, is_float32))
    buffer = b.buffer("average", ())
    b.mutate(buffer, torch.add(torch.mul(buffer, 0.5), torch.mean(value)))
    return torch.mul(value, buffer) if c.flag() else None


def layer_norm(b: Builder, c: Choices) -> Tensor:
    """Layer norm over the last dimension."""
    value = b.value(c, lambda v: _features(v, 2) and is_float32(v))
    shape = value.shape[-1:]
    affine = c.flag()
    weight, bias = (b.param("weight", shape), b.param("bias", shape)) if affine else (None, None)
    return F.layer_norm(value, shape, weight, bias)


def embedding(b: Builder, c: Choices) -> Tensor:
    """Rows of a table."""
    rows, width = c.integer(2, 4), c.integer(1, 4)
    indices = b.input(b.batched((2, 3)), torch.int64)
    return F.embedding(indices, b.param("weight", (rows, width), c))


def softmax(b: Builder, c: Choices) -> Tensor:
    """A softmax or its logarithm."""
    value = b.value(c, lambda v: v.ndim >= 1)
    dim = c.integer(0, value.ndim - 1)
    return torch.log_softmax(value, dim) if c.flag() else torch.softmax(value, dim)


def cross_entropy(b: Builder, c: Choices) -> Tensor:
    """A loss against class indices."""
    logits = b.value(c, lambda v: v.ndim == 2 and is_float32(v) and _are_examples(v))
    return F.cross_entropy(logits, b.input(logits.shape[:1], torch.int64))
