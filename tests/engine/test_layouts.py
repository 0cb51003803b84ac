"""Kernels whose results lie otherwise in memory than tracing says: what views them, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.runtime.backends.calls import bind

BODIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean of squares": lambda h, x: F.mse_loss(h.transpose(1, 2), x.transpose(1, 2).contiguous()),
    "dropout": lambda h, x: F.mse_loss(F.dropout(h, 0.5).transpose(1, 2), x.mT.contiguous()),
    "softplus": lambda h, x: (F.softplus(h.transpose(1, 2)) * x.mT.contiguous()).sum(),
    "smooth": lambda h, x: F.smooth_l1_loss(h.permute(2, 0, 1), x.permute(2, 0, 1).contiguous()),
}


class Net(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.body = nn.Linear(5, 5), nn.Linear(5, 5), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.second(self.first(x)), x)


def _step(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    net.zero_grad()
    loss = net(x)
    loss.backward()
    return [loss, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", BODIES)
def test_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(BODIES[name]), torch.randn(3, 4, 5)
    expected = _step(copy.deepcopy(net), x)
    graphopt.optimize(net, backend="eager")
    for wanted, actual in zip(expected, _step(net, x), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_a_view_is_one_where_that_can_be() -> None:
    bound: dict[str, Callable[..., Tensor]] = {}
    view = bound[bind("aten.view.default", bound).rstrip("(")]
    x = torch.arange(6.0).view(2, 3)
    assert view(x, [3, 2]).data_ptr() == x.data_ptr()
    assert view(x.t(), [6]).tolist() == [0, 3, 1, 4, 2, 5]
