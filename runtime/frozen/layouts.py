"""Which values of an inference graph lie in channels-last layout, when operators run one by one.

Packed convolutions read and give channels-last values. Every other operator is one of these:

- it follows: its result lies as its operands do (`follows`);
- it reads any layout and gives the recorded one, as a sum over all pixels does;
- it depends on strides, or nothing is known of it: it gets the recorded layout.

A value that is read in another layout than it has costs one copy, for all such readers together.
The layouts of what follows are chosen so that copies move the fewest bytes, which is a minimum cut.
Results of the module have the strides that the graph records.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.cut import SINK, SOURCE, Network
from graphopt.analysis.fakes import keeping_symbols
from graphopt.runtime.frozen.fusions import FUSED

aten = torch.ops.aten

# By family; what is pointwise says so itself. `tests/frozen/test_layouts.py` runs each of them.
_CONCATENATION = {aten.cat.default}
_NORMS = {
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
    aten.native_group_norm.default,
}
_POOLING = {
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
}
_PADDING = {
    aten.constant_pad_nd.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
}
_RESAMPLING = {
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten._upsample_nearest_exact2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.default,
}
# Pointwise, though their tags do not say so.
_UNTAGGED = {aten.hardswish.default, aten._to_copy.default}
FAMILIES: Mapping[str, set[OpOverload]] = {
    "concatenation": _CONCATENATION,
    "normalisation": _NORMS,
    "pooling": _POOLING,
    "padding": _PADDING,
    "resampling": _RESAMPLING,
    "pointwise": _UNTAGGED,
    "convolution": {aten.convolution.default},
}
_FOLLOWING = frozenset(target for family in FAMILIES.values() for target in family)
_REDUCTIONS = frozenset(
    {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction}
)


def follows(node: fx.Node) -> bool:
    """Whether the result of an operator lies as its operands do, channels-last or contiguous."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    if node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return False
    return torch.Tag.pointwise in target.tags or target in _FOLLOWING


def keep_layouts(graph: fx.Graph) -> int:
    """Choose layouts and insert the copies; returns how many.

    Args:
        graph: with fused convolutions, and with the strides in which the user's model ran.
    """
    fused = graph.find_nodes(op="call_function", target=FUSED)
    if not fused:
        return 0
    sides = {node: _side(node) for node in graph.nodes}
    network = _network(graph, sides)
    reached = network.source_side()
    last = {n for n in graph.nodes if sides[n] is SOURCE or (sides[n] is n and n in reached)}
    copies = 0
    for node in list(graph.nodes):
        if _converts(node):
            copies += _insert(graph, node, last, sides)
        elif node in last and _is_returned(node):
            copies += _copy(graph, node, [graph.output_node()], torch.contiguous_format)
    for node in last:
        node.meta = {**node.meta, "val": _laid_out(node.meta["val"])}
    return copies


# -- what is known of each value -------------------------------------------------------------------


def _side(node: fx.Node) -> object:
    """Where the layout of a node's result is decided: fixed, or a variable of its own."""
    if node.target is FUSED:
        return SOURCE
    if node.op != "call_function" or not follows(node):
        return SINK
    value = node.meta.get("val")
    is_small = isinstance(value, Tensor) and value.dim() == 4 and _is_either(value)
    return node if (is_small or _converts(node)) and any(map(_converts, _read(node))) else SINK


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands whose layout matters: not that of a convolution's weight."""
    if node.target is FUSED:
        return [n for n in (node.args[0], node.args[7]) if isinstance(n, fx.Node)]
    if node.target is aten.convolution.default:
        return [node.args[0]]  # type: ignore[list-item]
    return node.all_input_nodes


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and not _is_either(value)


def _is_either(value: Tensor) -> bool:
    """Whether contiguous and channels-last are the same for these sizes."""
    n = value.shape
    return statically_known_true(n[1] == 1) or (
        statically_known_true(n[2] == 1) and statically_known_true(n[3] == 1)
    )


def _converts(node: fx.Node) -> bool:
    """Whether the two layouts of a value differ, and the recorded one is the contiguous one."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return any(_is_image(v) and _is_contiguous(v) for v in value)
    return isinstance(value, Tensor) and _is_image(value) and _is_contiguous(value)


def _is_contiguous(value: Tensor) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not (statically_known_true(stride == expected) or statically_known_true(size == 1)):
            return False
        expected = expected * size
    return True


def _needs(reader: fx.Node, value: fx.Node, sides: Mapping[fx.Node, object]) -> object:
    """The side on which a reader wants a value; ``None`` where it takes both."""
    if reader.target is FUSED:
        return SOURCE if value in _read(reader) else None
    if sides[reader] is reader:
        return reader if value in _read(reader) else None
    if reader.target in _REDUCTIONS and _reduced(reader) == {2, 3}:
        return None
    return SINK


def _reduced(node: fx.Node) -> set[int]:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return {int(d) % 4 for d in dims} if isinstance(dims, list | tuple) else set()


# -- the cut ---------------------------------------------------------------------------------------


def _network(graph: fx.Graph, sides: Mapping[fx.Node, object]) -> Network:
    network = Network()
    for value in graph.nodes:
        if not _converts(value):
            continue
        side, cost = sides[value], 2.0 * _bytes(value.meta["val"])
        down, up = ("down", value), ("up", value)
        for reader in value.users:
            wanted = _needs(reader, value, sides)
            if wanted is None:
                continue
            if reader.target is operator.getitem:  # the same memory
                network.edge(side, wanted, None)
                network.edge(wanted, side, None)
                continue
            network.edge(down, wanted, None)
            network.edge(wanted, up, None)
        network.edge(side, down, cost)
        network.edge(up, side, cost)
    return network


def _bytes(value: Any) -> float:
    if isinstance(value, tuple | list):
        return 0.0
    number = value.numel()
    if isinstance(number, torch.SymInt):
        number = number.node.hint or 1
    return float(number) * float(value.element_size())


def _insert(
    graph: fx.Graph, value: fx.Node, last: set[fx.Node], sides: Mapping[fx.Node, object]
) -> int:
    """Copy a value for those of its readers that want it in its other layout."""
    if value.target is not operator.getitem and isinstance(value.meta["val"], tuple | list):
        return 0
    lies_last = value in last
    differing = []
    for reader in value.users:
        wanted = _needs(reader, value, sides)
        wants_last = lies_last if wanted is None else wanted is SOURCE or wanted in last
        if wants_last != lies_last:
            differing.append(reader)
    if not differing:
        return 0
    layout = torch.contiguous_format if lies_last else torch.channels_last
    return _copy(graph, value, differing, layout)


def _is_returned(node: fx.Node) -> bool:
    """Whether the user gets a value of which only strides that mean nothing differ."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.dim() != 4 or not _is_either(value):
        return False
    n, strides = value.shape, value.stride()
    plain = (n[1] * n[2] * n[3], n[2] * n[3], n[3], 1)
    is_plain = all(statically_known_true(a == b) for a, b in zip(strides, plain, strict=True))
    return is_plain and any(user.op == "output" for user in node.users)


def _copy(
    graph: fx.Graph, value: fx.Node, readers: list[fx.Node], layout: torch.memory_format
) -> int:
    with graph.inserting_before(min(readers)):
        copy = graph.call_function(aten.clone.default, (value,), {"memory_format": layout})
    fake = value.meta["val"]
    copy.meta = {
        **value.meta,
        "val": _laid_out(fake) if layout is torch.channels_last else fake,
    }
    for reader in readers:
        reader.replace_input_with(value, copy)
    return 1


def _laid_out(value: Any) -> Any:
    """A fake value, or several, in channels-last layout."""
    if isinstance(value, tuple | list):
        return type(value)(_laid_out(v) for v in value)
    if not _is_image(value):
        return value
    with keeping_symbols([value]):
        return torch.empty_like(value, memory_format=torch.channels_last)
