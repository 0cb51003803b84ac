"""A model for the command line; the file may be read more than once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.faults import Net


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and its call."""
    return Net(), (torch.randn(16, 8),)
