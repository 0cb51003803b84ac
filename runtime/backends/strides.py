"""Results in the strides that the user's model gives them, where kernels give others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


def results_of(module: fx.GraphModule) -> list[Any]:
    """The fake values of the results, in the strides that the user's model gives them."""
    nodes = cast("Sequence[Any]", module.graph.output_node().args[0])
    return [node.meta["val"] if isinstance(node, fx.Node) else None for node in nodes]


def restore(module: fx.GraphModule, recorded: Sequence[Any]) -> bool:
    """Have results come in the recorded strides, where packed kernels give others.

    Returns:
        Whether that was possible.
    """
    from torch._inductor.compile_fx import fake_tensor_prop
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    cast("Any", view_to_reshape)(module)
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        fake_tensor_prop(module, values, True)
    output = module.graph.output_node()
    results = list(cast("Sequence[Any]", output.args[0]))
    for index, (node, before) in enumerate(zip(results, recorded, strict=True)):
        if isinstance(before, Tensor) and not _are_equal(node.meta["val"].stride(), before):
            order = _order(before)
            if order is None:
                return False
            with module.graph.inserting_before(output):
                results[index] = _copied(module.graph, node, order, before)
    output.args = (results,)
    module.recompile()
    return True


def _are_equal(strides: Sequence[Any], value: Tensor) -> bool:
    pairs = zip(strides, value.stride(), strict=True)
    return all(statically_known_true(a == b) for a, b in pairs)


def _order(value: Tensor) -> list[int] | None:
    """The dimensions of a dense value from the outermost to the innermost one."""
    order = list(range(value.dim()))
    if all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        strides, sizes = list(value.stride()), list(value.shape)
        order.sort(key=lambda d: (-strides[d], -sizes[d], d))
    expected: Any = 1
    for d in reversed(order):
        if not statically_known_true(value.stride(d) == expected):
            return None
        expected = expected * value.size(d)
    return order


def _copied(graph: fx.Graph, node: fx.Node, order: list[int], like: Tensor) -> fx.Node:
    """A copy whose dimensions lie in memory in this order."""
    inner = graph.call_function(aten.permute.default, (node, order))
    layout = torch.contiguous_format
    copy = graph.call_function(aten.clone.default, (inner,), {"memory_format": layout})
    back = [order.index(d) for d in range(len(order))]
    outer = graph.call_function(aten.permute.default, (copy, back))
    inner.meta["val"] = node.meta["val"].permute(order)
    copy.meta["val"] = like.permute(order)
    outer.meta = {**node.meta, "val": like}
    return outer
