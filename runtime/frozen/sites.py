"""The layers of an inference graph that packed kernels can run, and which of them are faster so."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ops.convolution import reference
from graphopt.runtime.frozen.fusions import is_supported
from graphopt.runtime.frozen.products import is_product
from graphopt.runtime.frozen.prologue import reads_constant
from graphopt.runtime.frozen.worth import Run, is_faster, sample

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn
mkl = torch.ops.mkl


# -- products with a weight ------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias`` as an operator; the shape is (rows, features)."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def linears(graph: fx.Graph, kept: Collection[fx.Node]) -> list[Linear]:
    """The products with kept weights for which there is a packed kernel."""
    found = (linear_of(node, kept) for node in graph.nodes)
    return [linear for linear in found if linear is not None]


def linear_of(node: fx.Node, kept: Collection[fx.Node]) -> Linear | None:
    """The product that a node is, where there is a packed kernel for it."""
    bias: Any = None
    if node.target is aten.mm.default:
        x, weight = node.args
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
    else:
        return None
    if not isinstance(x, fx.Node) or reads_constant(weight, kept) is None:
        return None
    value: Tensor = node.meta["val"]
    sizes = (*value.shape, x.meta["val"].shape[1])
    if not is_supported(value) or not all(isinstance(n, int) and n > 0 for n in sizes):
        return None
    if value.dtype is torch.float32 and not torch._C.has_mkl:
        return None
    if bias is not None and tuple(bias.meta["val"].shape) != (value.shape[1],):
        return None
    return Linear(node, x, weight, bias)  # type: ignore[arg-type]


def linear_is_faster(linear: Linear) -> bool:
    """Whether the packed kernel computes a product faster."""
    x, value = linear.x.meta["val"], linear.node.meta["val"]
    rows, inputs, outputs = int(x.shape[0]), int(x.shape[1]), int(value.shape[1])
    what = f"linear {value.dtype} {rows} {inputs} {outputs} {linear.bias is not None}"

    def make() -> tuple[Run, Run]:
        given, weight = sample(x), sample(value.new_empty((outputs, inputs), device="meta"))
        bias = None if linear.bias is None else sample(linear.bias.meta["val"])
        if value.dtype is torch.float32:
            reordered = mkl._mkl_reorder_linear_weight(weight, rows)

            def packed() -> object:
                return mkl._mkl_linear(given, reordered, weight, bias, rows)

        else:
            reordered = mkldnn._reorder_linear_weight(weight, rows)

            def packed() -> object:
                return mkldnn._linear_pointwise(given, reordered, bias, "none", [], "")

        transposed = weight.t()

        def plain() -> object:
            if bias is None:
                return torch.mm(given, transposed)
            return torch.addmm(bias, given, transposed)

        return packed, plain

    return is_faster(what, make)


# -- convolutions ----------------------------------------------------------------------------------


def convolution_is_faster(arguments: tuple[Any, ...], is_compiled: bool = False) -> bool:
    """Whether a packed kernel runs a fused convolution faster than PyTorch's operators do.

    Where sizes are symbols, there is nothing to measure, and the packed kernel is taken.

    Args:
        arguments: of the fused operator.
        is_compiled: what comes after the convolution is one pass over its result then, and a
            product over channels runs as one.
    """
    x, weight, bias, *geometry, other, post, scalars, algorithm = arguments
    given, kernel = x.meta["val"], weight.meta["val"]
    if not all(isinstance(n, int) for n in (*given.shape, *kernel.shape)):
        return True
    stride, padding, dilation, groups = geometry
    what = (
        f"convolution {given.dtype} {tuple(given.shape)} {tuple(kernel.shape)} {bias is not None} "
        f"{geometry} {other is not None} {post} {scalars} {algorithm} {is_compiled}"
    )

    def make() -> tuple[Run, Run]:
        last = torch.channels_last
        values = sample(given).to(memory_format=last)
        weights = sample(kernel)
        offset = None if bias is None else sample(bias.meta["val"])
        reordered = mkldnn._reorder_convolution_weight(
            weights, padding, stride, dilation, groups, list(values.shape)
        )
        call = (padding, stride, dilation, groups)
        weights = weights.to(memory_format=last)
        added = None if other is None else sample(other.meta["val"]).to(memory_format=last)

        def packed() -> object:
            if added is None:
                after = (post, scalars, algorithm)
                return mkldnn._convolution_pointwise(values, reordered, offset, *call, *after)
            sums = ("add", 1.0, None if post == "none" else post, scalars, None)
            kernels = mkldnn._convolution_pointwise.binary
            return kernels(values, added, reordered, offset, *call, *sums)

        def plain() -> object:
            geometry = (stride, padding, dilation, groups)
            return reference(values, weights, offset, *geometry, added, post, scalars, algorithm)

        rows, matrix = values.permute(0, 2, 3, 1).flatten(0, 2), weights.flatten(1).t()
        multiplies = is_product(weight, stride, padding, dilation, groups)
        is_bare = bias is None and other is None and post == "none"

        def compiled() -> object:
            if multiplies:
                y = torch.mm(rows, matrix)
            else:
                y = torch.conv2d(values, weights, None, stride, padding, dilation, groups)
            return y if is_bare else y.relu_()

        return packed, compiled if is_compiled else plain

    return is_faster(what, make)
