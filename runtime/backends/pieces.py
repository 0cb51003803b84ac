"""Write into a tensor where nobody reads its old value any more, instead of into a copy of it.

Capture has made ``states[i] = row`` a copy of all states with one row replaced, so that a loop over
rows copies the whole of it at every turn; of ``relu(x, inplace=True)`` a new tensor; and where
autograd adds a second gradient to the first, a new tensor. Inductor writes all of them in place;
the eager backend does it here, for elementwise operators wherever an operand dies with them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt.analysis.aliasing import is_view, storage_of

aten = torch.ops.aten

# A copy of the first argument with a piece replaced: the view that the piece is written through.
_VIEWS: dict[Any, Any] = {
    aten.select_scatter.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
# A copy of the first argument that is changed: the operator that changes the argument.
_WRITING: dict[Any, Any] = {
    **{
        getattr(getattr(aten, name), overload): getattr(getattr(aten, name + "_"), overload)
        for name, overload in (
            *((name, "Tensor") for name in ("add", "sub", "mul", "div")),
            *((name, "Scalar") for name in ("add", "sub", "mul", "div")),
            *((name, "default") for name in ("relu", "gelu", "silu", "sigmoid", "tanh")),
            *((name, "default") for name in ("hardswish", "hardsigmoid", "hardtanh", "elu")),
            *((name, "default") for name in ("leaky_relu", "neg", "exp", "sqrt", "rsqrt")),
            ("masked_fill", "Scalar"),
        )
    },
    aten.index_put.default: aten.index_put_.default,
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter_add.default: aten.scatter_add_.default,
}
# Elementwise operators that may return any of their operands' memory: the form of the operator that
# is told where to write, and the name of that argument. Operands keep their order.
_INTO: dict[Any, tuple[Any, str]] = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.where.self: (aten.where.self_out, "out"),
    **{
        getattr(aten, name + "_backward").default: (
            getattr(aten, name + "_backward").grad_input,
            "grad_input",
        )
        for name in (
            *("threshold", "gelu", "silu", "sigmoid", "tanh"),
            *("hardsigmoid", "hardtanh", "elu", "leaky_relu"),
        )
    },
}
# Besides elementwise operators, those that surely allocate what they return.
_FRESH = {
    *_VIEWS,
    *_WRITING,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.addmm.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
    aten.bmm.default,
    aten.cat.default,
    aten.clone.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.full.default,
    aten.full_like.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.mean.dim,
    aten.mm.default,
    aten.native_batch_norm_backward.default,
    aten.native_dropout.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.select_backward.default,
    aten.slice_backward.default,
    aten.sum.dim_IntList,
    aten.zeros.default,
    aten.zeros_like.default,
}


def write_in_place(graph: fx.Graph) -> None:
    """Replace functional writes in `graph` by writes, where no value can tell."""
    memory = _Memory(graph.nodes)
    for node in list(graph.nodes):
        base = _base(node, memory)
        if base is None:
            continue
        pieces = list(_pieces(node))
        with graph.inserting_before(node):
            if node.target in _VIEWS:
                _write(graph, node, pieces, memory)
            elif node.target in _WRITING and base is node.args[0]:
                graph.call_function(_WRITING[node.target], node.args, node.kwargs)
            else:
                into, name = _INTO[node.target]
                graph.call_function(into, node.args, {**node.kwargs, name: base})
        memory.join(base, node)
        node.replace_all_uses_with(base)
        graph.erase_node(node)
        for piece in pieces:
            _erase_unused(graph, piece)


def _base(node: fx.Node, memory: _Memory) -> fx.Node | None:
    """The operand whose memory may hold what a node returns."""
    first = node.args[:1] if node.target in _VIEWS or node.target in _WRITING else ()
    others = node.args if node.target in _INTO else ()
    for operand in (*first, *others):
        if isinstance(operand, fx.Node) and memory.dies_with(operand, node):
            return operand
    return None


class _Memory:
    """Which nodes lie in one memory, and who reads it last."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._order = {node: index for index, node in enumerate(nodes)}
        self._owner = dict(storage_of(self._order).owner)
        self._in: dict[fx.Node, list[fx.Node]] = {}
        for node, owner in self._owner.items():
            self._in.setdefault(owner, []).append(node)

    def dies_with(self, base: fx.Node, node: fx.Node) -> bool:
        """Whether `node` reads the memory of `base` last, and may write there what it returns."""
        owner = self._owner[base]
        others = [n for n in node.all_input_nodes if n is not base]
        return (
            _allocates(owner)
            and _same_layout(base, node)
            and all(self._owner[other] is not owner for other in others)
            and all(
                # What `_write` has inserted stands before an earlier node, so before this one.
                _ends(user) and self._order.get(user, 0) <= self._order[node]
                for alias in self._in[owner]
                for user in alias.users
            )
        )

    def apart(self, source: Any, piece: Any) -> bool:
        """Whether two values have no byte in common."""
        return self._owner.get(source) is not self._owner[piece] or _disjoint(source, piece)

    def join(self, base: fx.Node, node: fx.Node) -> None:
        """What lay in the memory of `node` lies in that of `base` from now on."""
        owner = self._owner[base]
        for alias in self._in.pop(node):
            self._owner[alias] = owner
            self._in[owner].append(alias)


def _ends(user: fx.Node) -> bool:
    """Whether an operator has read its arguments when it returns; collectives go on reading."""
    return user.target is operator.getitem or _is_aten(user.target)


def _allocates(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return node.all_input_nodes[0].target in _FRESH
    return node.target in _FRESH or (
        _is_aten(node.target) and torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
    )


def _is_aten(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def _same_layout(base: fx.Node, node: fx.Node) -> bool:
    before, after = base.meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.shape == after.shape
        and before.stride() == after.stride()
        and before.dtype == after.dtype
    )


def _write(graph: fx.Graph, node: fx.Node, pieces: list[fx.Node], memory: _Memory) -> None:
    """Write through the view that `node` would have replaced, or through a view of that."""
    base, value, *where = node.args
    view = graph.call_function(_VIEWS[node.target], (base, *where), node.kwargs)
    for piece in pieces:
        if not _same_view(piece.args[0], view):
            break
        if piece.target is aten.copy.default:
            if memory.apart(piece.args[1], piece.args[0]):
                value = piece.args[1]
            break
        _, value, *where = piece.args
        view = graph.call_function(_VIEWS[piece.target], (view, *where), piece.kwargs)
    graph.call_function(aten.copy_.default, (view, value))


def _erase_unused(graph: fx.Graph, piece: fx.Node) -> None:
    """A piece, and the views that only it has read."""
    while not piece.users:
        view = piece.args[0]
        graph.erase_node(piece)
        if not isinstance(view, fx.Node) or not is_view(view.target):
            return
        piece = view


def _pieces(node: fx.Node) -> Iterator[fx.Node]:
    """The pieces in the pieces that `node` writes, from the outermost in, used for nothing else.

    Capture makes them of ``x[1:, 0] = y``: a copy of y goes into a row, and that into a slice.
    """
    while node.target in _VIEWS:
        before, node = node, node.args[1]  # type: ignore[assignment]
        between = before.prev
        while is_view(between.target):
            between = between.prev
        if between is not node or len(node.users) > 1:
            return
        if node.target in _VIEWS or node.target is aten.copy.default:
            yield node


def _same_view(a: Any, b: fx.Node) -> bool:
    if a is b:
        return True
    return (
        isinstance(a, fx.Node)
        and a.target is b.target
        and is_view(a.target)
        and a.kwargs == b.kwargs
        and a.args[1:] == b.args[1:]
        and _same_view(a.args[0], b.args[0])  # type: ignore[arg-type]
    )


def _disjoint(a: fx.Node, b: fx.Node) -> bool:
    """Whether two slices of one tensor have no element in common."""
    if not a.target is b.target is aten.slice.Tensor or a.args[:2] != b.args[:2]:
        return False
    (start, end), (other_start, other_end) = (_bounds(node) for node in (a, b))
    return end <= other_start or other_end <= start


def _bounds(node: fx.Node) -> tuple[int, int]:
    source, dim = cast("tuple[fx.Node, int]", node.args[:2])
    start, end, _ = slice(*node.args[2:4]).indices(source.meta["val"].shape[dim])
    return start, end
