"""Outputs that forward makes in a mode of its own, of which a graph could only keep the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode

from graphopt.errors import CaptureError
from graphopt.graph import source_of


def refuse_modes_of_outputs(module: fx.GraphModule) -> None:
    """Refuse outputs that differentiate under ``no_grad``, or that autograd may not touch.

    Args:
        module: a torch-level graph with example values, as Dynamo returns it.

    Raises:
        CaptureError: forward turns gradients on under the caller's ``no_grad``, or returns what it
            made in ``inference_mode``.
    """
    inside = _in_inference_mode(module)
    outputs = cast("Sequence[object]", module.graph.output_node().args[0])
    for node in outputs:
        value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
        if (
            not isinstance(node, fx.Node)
            or not isinstance(value, Tensor)
            or node.op == "placeholder"
        ):
            continue
        if value.requires_grad and not torch.is_grad_enabled():
            raise CaptureError(
                "forward turns gradients on although the caller has turned them off, and returns "
                "what it computes with them",
                where=source_of(node),
                hint="call the model without torch.no_grad()",
            )
        if node in inside and not torch.is_inference_mode_enabled():
            raise CaptureError(
                "forward returns what it computes in torch.inference_mode()",
                where=source_of(node),
                hint="use torch.no_grad() in forward",
            )


def _in_inference_mode(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes between entering and leaving it."""
    inside: set[fx.Node] = set()
    entered: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.target is _enter_inference_mode and node.args[0]:
            entered.add(node)
        elif node.target is _exit_inference_mode:
            entered.discard(cast("fx.Node", node.args[0]))
        elif entered:
            inside.add(node)
    return inside
