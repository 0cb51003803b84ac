"""A backward runs outside of autocast, as eager's does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.as_graph import assert_equal, step, twins


class Regions(nn.Module):
    """One layer under the caller's autocast, one in 32 bits."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.low, self.full = nn.Linear(4, 8), nn.Linear(8, 2)
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        h = h.detach() if self.detach else h
        with torch.autocast("cpu", enabled=False):
            return self.full(h.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_gradients_of_regions(dtype: torch.dtype, detach: bool, scale: float) -> None:
    plain, graph = twins(Regions(detach))
    x = torch.randn(3, 4)
    results = []
    for call, model in ((plain, plain), (graph, graph.model)):

        def under_autocast(x: Tensor, call: object = call) -> Tensor:
            with torch.autocast("cpu", dtype):
                return call(x)  # type: ignore[operator, no-any-return]

        results.append(step(under_autocast, model, x, loss=lambda y: y.square().sum() * scale))
    assert_equal(*results)
    full = results[1][1][2]
    assert torch.isfinite(full).all()


def test_everything_under_autocast() -> None:
    plain, graph = twins(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    results = []
    for call, model in ((plain, plain), (graph, graph.model)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(call, model, x, loss=lambda y: y.float().square().sum()))
    assert_equal(*results)
