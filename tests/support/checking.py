"""Forward code that checks values; pytest rewrites assertions in test modules, so it is here."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def raises(h: Tensor) -> Tensor:
    if h.max() >= 1e6:
        raise ValueError(f"too large: {h.max()}")
    return h


def asserts(h: Tensor) -> Tensor:
    assert not torch.isnan(h).any(), "nan in h"
    return h


def asserts_tensor(h: Tensor) -> Tensor:
    assert torch.isfinite(h).all(), "not finite"
    return nn.functional.dropout(h)


def asserts_number(h: Tensor) -> Tensor:
    if not h.abs().max().item() < 1e6:
        raise OverflowError("too large")
    return h


def repairs(h: Tensor) -> Tensor:
    h = nn.functional.dropout(h)
    if torch.isinf(h).any() or torch.isnan(h).any():
        h = torch.nan_to_num(h, 1.0, 2.0, 3.0)
    return h
