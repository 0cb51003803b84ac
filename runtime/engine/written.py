"""What a forward writes while it runs, and what puts it back where the step fails after all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx


def written_inputs(graph: fx.Graph) -> tuple[int, ...]:
    """Which placeholders the operators of a graph write into, by position."""
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: dict[int, None] = {}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema
        if not schema.is_mutable:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                values = value if isinstance(value, (list, tuple)) else [value]
                nodes = [v for v in values if isinstance(v, fx.Node) and v in places]
                found |= {places[node]: None for node in nodes}
    return tuple(found)


class Before:
    """The values that tensors have now.

    Small tensors are kept together, one copy for all of a kind: a net with a hundred batch norms
    has hundreds.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            shape = () if tensor.dim() == 0 else None  # single numbers cannot be concatenated
            kinds.setdefault((tensor.dtype, tensor.device, shape), []).append(tensor)
        with torch.no_grad():
            self._kept = [(group, _together(group)) for group in kinds.values()]

    def restore(self) -> None:
        """Write them back."""
        with torch.no_grad():
            for group, values in self._kept:
                sizes = [t.numel() for t in group]
                for tensor, value in zip(group, torch.split(values, sizes), strict=True):
                    tensor.copy_(value.view(tensor.shape))


def _together(group: Sequence[Tensor]) -> Tensor:
    if group[0].dim() == 0:
        return torch.stack(list(group))
    return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in group])
