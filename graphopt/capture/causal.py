"""Whether the mask of an `nn.Transformer` layer is causal: asked of its values, in each call.

Encoders and decoders compare a mask with the causal one, and tell attention what they find; which
kernel it then takes, and so the last bits, depends on that. Dynamo refuses to branch on a value.
Here the answer is the one of the captured call, computed from what its mask is made of, and the
graph gets a check of it: a call in which the answer is another one runs as PyTorch runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.functions import UserFunctionVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch.nn.modules import transformer
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.analysis.hints import hint
from graphopt.capture.plainly import random_state, restore_random_state
from graphopt.ops import expect  # noqa: F401


@contextmanager
def causal_masks() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    call = _answered(UserFunctionVariable.call_function)
    with mock.patch.object(UserFunctionVariable, "call_function", call):
        yield


def _answered(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.fn is not transformer._detect_is_causal_mask:
            return original(self, tx, args, kwargs)
        given = dict(zip(("mask", "is_causal", "size"), args, strict=False)) | kwargs
        said = given.get("is_causal")
        if given["mask"].is_constant_none() or not (said is None or said.is_constant_none()):
            return original(self, tx, args, kwargs)
        size = given.get("size", ConstantVariable.create(None))
        question = VariableTracker.build(tx, _is_causal)
        found = question.call_function(tx, [given["mask"], size], {})
        if not isinstance(found, TensorVariable):  # of another size than the causal one
            return found
        answer = _now(found.as_proxy().node)
        if answer is None:
            return original(self, tx, args, kwargs)
        check = (found.as_proxy(), answer)
        tx.output.create_proxy("call_function", torch.ops.graphopt.expect.default, check, {})
        return ConstantVariable.create(answer)

    return call_function


def _is_causal(mask: Tensor, size: int | None) -> Tensor | bool:
    """As torch asks, without making a Python bool of it."""
    length = mask.size(-2) if size is None else size
    causal = transformer._generate_square_subsequent_mask(
        length, device=mask.device, dtype=mask.dtype
    )
    return (mask == causal).all() if mask.size() == causal.size() else False


# -- the value that a tensor has in the captured call ----------------------------------------------


class _Unknown(Exception):
    """A value may be another one when it is computed again."""


def _now(node: fx.Node) -> bool | None:
    """What a boolean tensor is in the captured call; ``None`` where that cannot be told."""
    values: dict[fx.Node, Any] = {}
    before = random_state()
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for needed in _needed(node):
                values[needed] = _value(needed, values)
            drawn = not torch.equal(before[1], torch.get_rng_state())
            return None if drawn else bool(values[node])
    except (_Unknown, AssertionError, RuntimeError):
        return None
    finally:
        restore_random_state(before)


def _needed(node: fx.Node) -> list[fx.Node]:
    """What a node is computed from, in order, with what is done to any of that in place."""
    order = list(node.graph.nodes)
    needed = {node}
    count = 0
    while len(needed) > count:
        count = len(needed)
        for earlier in reversed(order):
            if earlier in needed:
                needed.update(earlier.all_input_nodes)
        derived = set(needed)
        for later in order:
            if derived.intersection(later.all_input_nodes):
                derived.add(later)
                if _in_place(later):
                    needed.add(later)
    return [n for n in order if n in needed]


def _in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changes = name in ("setitem", "copy_") or (name.endswith("_") and not name.endswith("__"))
    return changes or name.startswith("__i") or "out" in node.kwargs


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    example = node.meta.get("example_value")
    if isinstance(example, int | torch.SymInt):
        known = hint(example)
        if known is None:
            raise _Unknown
        return known
    if node.op == "placeholder":
        given = getattr(node.meta.get("grapharg"), "example", None)
        if not isinstance(given, Tensor):
            raise _Unknown
        return given.detach().clone()  # it may be changed in place
    if node.op not in ("call_function", "call_method"):
        raise _Unknown
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
