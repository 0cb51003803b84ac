"""Views that were traced behind a kernel, where the kernel's parts lay values out otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.model.surface import report


class Attention(nn.Module):
    """Attention with a trained bias, behind an empty cache of keys and values, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Two heads; a concatenation with nothing makes a new order of dimensions, or does not."""
        q, k, v = (f(x).view(3, 6, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (torch.cat([torch.tensor([]), cached], -2) for cached in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0).square()


@pytest.mark.slow
def test_inductor_compiles_attention_behind_an_empty_cache() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 6, 16)
    (expected := model(x)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    graphopt.optimize(model, backend="inductor")
    (found := model(x)).sum().backward()
    entry = report(model).specialisations[0]
    assert (entry.backend.backend, entry.verification.result) == ("inductor", "within tolerance")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
    assert found.stride() == expected.stride()
