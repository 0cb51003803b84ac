"""Dropout as eager runs it.

In eval mode eager returns its input itself, so that what is written into the result is written into
the input; tracing would return a copy. On CPUs eager multiplies by a mask that holds ``1 / (1 -
p)``, hence rounded to its dtype, forward and backward. The graph's operator for the backward
multiplies by the number itself: in bfloat16 0.08 % less for ``p = 0.3``, half of a last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from graphopt.capture.opaque import python_kernel
from graphopt.graph import Graph


@contextmanager
def eager_dropout() -> Iterator[None]:
    """While the backward is derived."""

    def dropout(x: Tensor, p: float, train: bool) -> Tensor:
        if not train or p == 0 or x.numel() == 0:
            return x
        if p == 1:  # without random numbers
            return x * torch.zeros((), dtype=x.dtype, device=x.device)
        dropped: Tensor = torch.ops.aten.native_dropout(x, p, train)[0]
        return dropped

    with python_kernel(torch.ops.aten.dropout.default, dropout):
        yield


def round_as_in_eager(graph: Graph) -> None:
    """Round the factors of dropouts on CPUs; changes the graph."""
    target = torch.ops.aten.native_dropout_backward.default
    for node in graph.fx.find_nodes(op="call_function", target=target):
        gradient, mask, scale = node.args
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.device.type == "cpu":
            rounded = torch.tensor(cast("float", scale), dtype=value.dtype).item()
            if rounded != scale and value.dtype.itemsize < 4:
                node.args = (gradient, mask, rounded)
                graph.changed()
