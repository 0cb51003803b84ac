"""Join a convolution with what one oneDNN kernel can do to its result.

A convolution with a frozen weight, the addition after it and the function after that become one
`graphopt::fused_convolution`. The graph means the same afterwards and has the same strides; which
kernels and layouts run it is decided later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

import graphopt.ops  # noqa: F401  (registers graphopt::fused_convolution)
from graphopt.runtime.frozen.prologue import reads_constant

aten = torch.ops.aten
FUSED = torch.ops.graphopt.fused_convolution.default

Post = tuple[str, list[float], str]
"""Name, numbers and algorithm of a function, as oneDNN's kernels take them."""

NONE: Post = ("none", [], "")


def fuse(
    graph: fx.Graph,
    constants: Collection[fx.Node],
    wanted: Callable[[tuple[Any, ...]], bool] = lambda _: True,
) -> list[fx.Node]:
    """Rewrite a graph in place.

    Args:
        graph: of an inference module.
        constants: nodes whose values are kept between calls.
        wanted: whether a convolution is to be fused, by the arguments of the fused operator.

    Returns:
        The fused convolutions.
    """
    found = [node for node in graph.nodes if is_packable(node, constants)]
    fused = (_fuse(graph, node, wanted) for node in found)
    return [node for node in fused if node is not None]


def is_packable(node: fx.Node, constants: Collection[fx.Node]) -> bool:
    """Whether oneDNN has a kernel for this convolution with a reordered weight."""
    if node.target is not aten.convolution.default or not node.users:
        return False
    x, weight, _, _, _, _, transposed = node.args[:7]
    if not isinstance(x, fx.Node) or transposed or not reads_constant(weight, constants):
        return False
    value: Tensor = node.meta["val"]
    return value.dim() == 4 and x.meta["val"].dim() == 4 and is_supported(value)


def is_supported(value: Tensor) -> bool:
    """Whether packed kernels of this build and processor give such a result."""
    if value.device.type != "cpu" or not available():
        return False
    if value.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return value.dtype is torch.float32


def available() -> bool:
    """Whether this build of PyTorch has the kernels."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _fuse(
    graph: fx.Graph, convolution: fx.Node, wanted: Callable[[tuple[Any, ...]], bool]
) -> fx.Node | None:
    x, weight, bias, stride, padding, dilation, _, _, groups = convolution.args
    chain, other, post = [convolution], None, NONE
    user = _only_user(convolution)
    if user is not None and (other := _added(user, convolution)) is not None:
        chain.append(user)
        user = _only_user(user)
    function = post_of(user) if user is not None else None
    # A kernel that adds something knows no other function after it.
    if user is not None and function is not None and (other is None or function[0] == "relu"):
        chain.append(user)
        post = function
    last = chain[-1]
    arguments = (x, weight, bias, stride, padding, dilation, groups, other, *post)
    if not wanted(arguments):
        return None
    with graph.inserting_before(last):
        fused = graph.call_function(FUSED, arguments)
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    for node in reversed(chain):
        graph.erase_node(node)
    return fused


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(addition: fx.Node, term: fx.Node) -> fx.Node | None:
    """What an addition adds to `term`, where it is a value of the same shape."""
    if addition.target is not aten.add.Tensor or addition.kwargs:
        return None
    a, b = addition.args
    other = b if a is term else a
    if not isinstance(other, fx.Node) or other is term or not _alike(other, term):
        return None
    return other


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    if not isinstance(x, Tensor) or x.dim() != y.dim() or x.dtype != y.dtype:
        return False
    # Strides count, too: the sum has those of its first operand.
    pairs = zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True)
    return all(statically_known_true(n == m) for n, m in pairs)


# -- functions of each result ----------------------------------------------------------------------


def post_of(node: fx.Node) -> Post | None:
    """The function that a node applies to each element of its first operand, if oneDNN has it."""
    read = _FUNCTIONS.get(node.target)
    if read is None or node.meta["val"].dtype != node.all_input_nodes[0].meta["val"].dtype:
        return None
    return read(node)


def _given(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _plain(name: str) -> Callable[[fx.Node], Post]:
    return lambda node: (name, [], "")


def _hardtanh(node: fx.Node) -> Post:
    limits = (_given(node, 1, "min_val", -1.0), _given(node, 2, "max_val", 1.0))
    return "hardtanh", [float(limit) for limit in limits], ""


def _clamp(node: fx.Node) -> Post | None:
    limits = (_given(node, 1, "min", None), _given(node, 2, "max", None))
    if not all(isinstance(limit, int | float) for limit in limits):
        return None
    return "hardtanh", [float(limit) for limit in limits], ""


def _leaky_relu(node: fx.Node) -> Post:
    return "leaky_relu", [float(_given(node, 1, "negative_slope", 0.01))], ""


def _gelu(node: fx.Node) -> Post:
    return "gelu", [], str(node.kwargs.get("approximate", "none"))


_FUNCTIONS: Mapping[Any, Callable[[fx.Node], Post | None]] = MappingProxyType(
    {
        aten.relu.default: _plain("relu"),
        aten.sigmoid.default: _plain("sigmoid"),
        aten.tanh.default: _plain("tanh"),
        aten.hardswish.default: _plain("hardswish"),
        aten.hardsigmoid.default: _plain("hardsigmoid"),
        aten.silu.default: _plain("swish"),
        aten.hardtanh.default: _hardtanh,
        aten.clamp.default: _clamp,
        aten.leaky_relu.default: _leaky_relu,
        aten.gelu.default: _gelu,
    }
)
