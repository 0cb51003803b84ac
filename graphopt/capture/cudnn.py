"""``with torch.backends.cudnn.flags(enabled=False)`` in forward, on a machine without CUDA.

Losses of speech models switch cuDNN off around the CTC loss. Nothing reads the switch where there
is no CUDA; where there is, a graph does not hold it, and Dynamo refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._dynamo.variables.ctx_manager import NullContextVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable


@contextmanager
def without_cudnn() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    call = _nothing(TorchInGraphFunctionVariable.call_function)
    with mock.patch.object(TorchInGraphFunctionVariable, "call_function", call):
        yield


def _nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value is torch.backends.cudnn.flags and not torch.cuda.is_available():
            return NullContextVariable()
        return original(self, tx, args, kwargs)

    return call_function
