"""What a call of a model may leave behind, as values that can be compared."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn


def traces(model: nn.Module, *more: object) -> list[object]:
    """All that could show a trace, as values and identities that can be compared."""
    found: list[object] = [torch.get_rng_state().tolist(), random.getstate()]
    found += [np.random.get_state()[1].tolist(), torch.is_grad_enabled()]
    found += [torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()]
    for module in model.modules():
        found.append(type(module).__name__)
        found += [] if module is model else [list(module.__dict__)]  # a controller may be there
        for table in ("_parameters", "_buffers", "_modules"):
            found.append(list(module.__dict__[table]))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found += [name, tensor.tolist(), tensor.requires_grad, tensor.is_leaf]
        found.append(None if tensor.grad is None else tensor.grad.tolist())
    for value in more:
        assert isinstance(value, Tensor)
        found += [value.tolist(), value.requires_grad, value.is_leaf, value.grad_fn is None]
        found += [value._version, value.grad is None]
    return found


def identities(model: nn.Module) -> list[int]:
    """Which objects the modules hold, in their dictionaries and in containers."""
    tables = [m.__dict__ for m in model.modules()]
    tables += [t[n] for t in tables for n in ("_parameters", "_buffers", "_modules")]
    return [id(value) for table in tables for value in table.values()]
