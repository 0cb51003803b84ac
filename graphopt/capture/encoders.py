"""`nn.TransformerEncoder` on padded batches: eager's way through nested tensors, which zeroes.

In evaluation without gradients eager makes a nested tensor of what the mask leaves, and the padded
positions of what comes out are 0. Told that it is being captured, the encoder takes another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo.exc import unimplemented
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable


@contextmanager
def refusing_nested_encoders() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    call = _unless_nested(TorchInGraphFunctionVariable.call_function)
    with mock.patch.object(TorchInGraphFunctionVariable, "call_function", call):
        yield


def _unless_nested(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        asks = self.value is torch.compiler.is_compiling
        if asks and tx.f_code is nn.TransformerEncoder.forward.__code__ and _nested(tx):
            unimplemented(
                gb_type="nn.TransformerEncoder makes nested tensors of a padded batch",
                context="src_key_padding_mask",
                explanation="Eager writes 0 at the padded positions; a graph would not.",
                hints=[],
            )
        return original(self, tx, args, kwargs)

    return call_function


def _nested(tx: Any) -> bool:
    """What eager asks after the one question whose answer is another while it is captured.

    That leaves out whether the mask pads on the right, which depends on data.
    """
    values = {name: tx.symbolic_locals[name].realize() for name in ("self", "src", "mask")}
    layer = values["self"].value.layers[0]
    if not values["mask"].is_constant_none() or torch.is_autocast_enabled():
        return False
    if not torch.is_grad_enabled():
        return True
    attention, norms = layer.self_attn, (layer.norm1, layer.norm2)
    weights = [attention.in_proj_weight, attention.in_proj_bias]
    for module in (attention.out_proj, *norms, layer.linear1, layer.linear2):
        weights += [module.weight, module.bias]
    return not values["src"].requires_grad and not any(w.requires_grad for w in weights)
