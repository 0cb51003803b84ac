"""Which operators produce each parameter's gradient, and from which pairs of tensors.

The operator that computes a weight's gradient takes exactly what K-FAC needs: the gradients of the
layer's outputs and the layer's inputs. Starting there instead of at modules also finds functional
calls on raw parameters, and every use of a shared weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import fx

from graphopt.graph import Graph, value_of
from graphopt.plan import Role

aten = torch.ops.aten

# Operators that show all elements of their operand, or copy them.
_COPIES = frozenset(
    {aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default}
)
_VIEWS = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)

NORMS = frozenset(
    {
        aten.native_batch_norm_backward.default,
        aten.cudnn_batch_norm_backward.default,
        aten.native_layer_norm_backward.default,
        aten.native_group_norm_backward.default,
        aten._fused_rms_norm_backward.default,
    }
)


@dataclass(frozen=True)
class Use:
    """One operator that contributes to a parameter's gradient.

    Attributes:
        kind: ``"matmul"``, ``"convolution"``, ``"embedding"``, ``"norm"``, ``"sum"`` (over
            examples), ``"rnn"``, or ``"other"``.
        node: the operator; of an operator with several results the operator itself.
        index: which of its results.
        transposed: whether the parameter holds the result's second dimension first.
        start: first row of the parameter that this use covers.
        rows: number of rows of the parameter that it covers.
        summed: whether a batch of matrix products is summed.
        reason: why the use is of kind ``"other"``.
    """

    kind: str
    node: fx.Node
    index: int = 0
    transposed: bool = False
    start: int = 0
    rows: int = 0
    summed: bool = False
    reason: str = ""


def weight_uses(graph: Graph) -> dict[str, tuple[Use, ...]]:
    """For every parameter that receives a gradient, the uses that its gradient is the sum of."""
    outputs = zip(graph.signature.outputs, graph.outputs, strict=True)
    parameters = set(graph.signature.names(Role.PARAM))
    return {
        slot.name: tuple(_uses(node))
        for slot, node in outputs
        if slot.role is Role.GRAD and slot.name in parameters
    }


def depends_on_tangents(graph: Graph) -> frozenset[fx.Node]:
    """All nodes that a tangent reaches."""
    reached = {
        node
        for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True)
        if slot.role is Role.TANGENT
    }
    for node in graph.nodes:
        if any(used in reached for used in node.all_input_nodes):
            reached.add(node)
    return frozenset(reached)


def base_of(node: fx.Node) -> fx.Node:
    """The tensor that a node shows or copies in full."""
    while node.target in _COPIES or node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node


@dataclass(frozen=True)
class _Term:
    """A summand of a gradient, and the views from it to the parameter's shape, innermost first."""

    node: fx.Node
    views: tuple[fx.Node, ...]
    start: int
    rows: int


def _uses(gradient: fx.Node) -> Iterator[Use]:
    value: torch.Tensor = value_of(gradient)
    rows = value.shape[0] if value.dim() else 1
    for term in _terms(_Term(gradient, (), 0, rows)):
        yield _classified(term)


def _terms(term: _Term) -> Iterator[_Term]:
    """Split sums and parts of a gradient until operators are found that are neither."""
    node = term.node
    if node.target in _COPIES or node.target in _VIEWS:
        views = term.views if node.target in _COPIES else (node, *term.views)
        yield from _terms(_Term(node.all_input_nodes[0], views, term.start, term.rows))
    elif node.target is aten.add.Tensor and len(node.all_input_nodes) == len(node.args) == 2:
        for operand in node.all_input_nodes:
            yield from _terms(_Term(operand, term.views, term.start, term.rows))
    elif node.target is aten.add.Tensor and node.args[0] is node.args[1]:
        yield term
    elif _splits_rows(node) and not term.views:
        start = term.start
        for part in cast("list[fx.Node]", node.args[0]):
            rows = value_of(part).shape[0]
            yield from _terms(_Term(part, (), start, rows))
            start += rows
    elif _pads_rows(node) and not term.views:
        part = cast("fx.Node", node.args[0])
        start = term.start + cast("int", node.args[3])
        yield from _terms(_Term(part, (), start, value_of(part).shape[0]))
    else:
        yield term


def _splits_rows(node: fx.Node) -> bool:
    return node.target is aten.cat.default and (len(node.args) < 2 or bool(node.args[1] == 0))


def _pads_rows(node: fx.Node) -> bool:
    """``slice_backward(part, sizes, dim, start, end, step)`` along the first dimension."""
    if node.target is not aten.slice_backward.default:
        return False
    known = isinstance(node.args[3], int)  # and no number that varies
    return bool(node.args[2] == 0 and node.args[5] == 1 and known)


def _classified(term: _Term) -> Use:
    node, index = term.node, 0
    if node.target is operator.getitem:
        node, index = cast("tuple[fx.Node, int]", node.args)
    use = Use("other", node, index, start=term.start, rows=term.rows)
    target = node.target
    if target is torch.ops.graphopt.rnn_backward.default:
        return _replaced(use, kind="rnn") if not term.views else _other(use, "seen through views")
    if target in NORMS and index in (1, 2):
        return _replaced(use, kind="norm")
    if target is aten.convolution_backward.default and index in (1, 2):
        return _laid_out(use, term, "convolution")
    if target is aten.mm.default or target is aten.bmm.default:
        return _laid_out(use, term, "matmul")
    if target is aten.embedding_dense_backward.default:
        if node.args[4]:
            return _other(use, "its gradient is scaled by token frequency")
        return _laid_out(use, term, "embedding")
    if target in (aten.sum.dim_IntList, aten.sum.default):
        operand = node.all_input_nodes[0]
        product = base_of(operand)
        dims = list(cast("Any", node.args[1])) if len(node.args) > 1 else []
        if product.target is aten.bmm.default and dims == [0] and _same_shape(product, operand):
            return _laid_out(_replaced(use, node=product, summed=True), term, "matmul")
        rank = value_of(operand).dim()
        if not dims or 0 in dims or -rank in dims:
            return _replaced(use, kind="sum")
        return _other(use, "its gradient is not a sum over examples")
    name = getattr(target, "_name", str(target)).removeprefix("aten::")
    return _other(use, f"its gradient comes from {name}")


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return bool(value_of(one).shape == value_of(other).shape)


def _replaced(use: Use, **changes: Any) -> Use:
    return Use(**{**vars(use), **changes})


def _other(use: Use, reason: str) -> Use:
    return _replaced(use, kind="other", reason=reason)


def _laid_out(use: Use, term: _Term, kind: str) -> Use:
    """The use with its orientation, or ``"other"`` where neither way round fits the parameter."""
    value: torch.Tensor = value_of(use.node)[use.index] if use.index else value_of(use.node)
    result = torch.empty(value.shape, device="meta")
    if use.summed:
        result = torch.empty((1, *value.shape[1:]), device="meta")
    try:
        seen = _apply(result, term.views)
    except RuntimeError:
        return _other(use, "its gradient is laid out in an unusual way")
    if _dense(seen):
        return _replaced(use, kind=kind)
    sizes = [s for s in result.shape if s != 1] if result.dim() == 3 else list(result.shape)
    if kind in ("matmul", "embedding") and len(sizes) == 2 and _dense_transposed(seen, sizes[0]):
        return _replaced(use, kind=kind, transposed=True)
    return _other(use, "its gradient is laid out in an unusual way")


def _apply(value: torch.Tensor, views: tuple[fx.Node, ...]) -> torch.Tensor:
    for view in views:
        target = cast("Any", view.target)
        if target in (aten._unsafe_view.default, aten.reshape.default):
            target = aten.view.default
        value = target(value, *view.args[1:], **view.kwargs)
    return value


def _dense(value: torch.Tensor) -> bool:
    return value.is_contiguous()


def _dense_transposed(value: torch.Tensor, first: int) -> bool:
    """Whether the transpose, which has `first` elements in its leading dimensions, is dense."""
    dims = list(range(value.dim()))
    return any(
        prod(value.shape[k:]) == first and value.permute(*dims[k:], *dims[:k]).is_contiguous()
        for k in dims[1:]
    )
