"""Random numbers that nobody reads are drawn all the same: those after them are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt

Body = Callable[[nn.Module, Tensor], object]

BODIES: dict[str, Body] = {
    "dropout": lambda net, x: F.dropout(net(x), 0.1),
    "like": lambda net, x: torch.rand_like(x),
    "attention": lambda net, x: F.scaled_dot_product_attention(
        x[None], net(x)[None], x[None], dropout_p=0.1
    ),
    "bernoulli": lambda net, x: torch.bernoulli(x.sigmoid()),
    "several": lambda net, x: (torch.randn(3), F.dropout(x, 0.5), torch.randint(5, (2,))),
}


class Net(nn.Module):
    """Draws what it does not use, before and behind what it uses."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.net, self.body = nn.Linear(6, 6), body

    def forward(self, x: Tensor) -> Tensor:
        self.body(self.net, x)
        y = F.dropout(self.net(x), 0.5)
        self.body(self.net, y)
        return y + torch.rand(())


def _outcome(net: nn.Module, x: Tensor, *, train: bool) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.set_grad_enabled(train):
        outputs = [net(x) for _ in range(2)]
    found = [*outputs, torch.get_rng_state()]
    if train:
        found += torch.autograd.grad(sum(outputs).sum(), list(net.parameters()))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", BODIES)
def test_the_random_stream_is_eagers(name: str, train: bool) -> None:
    torch.manual_seed(0)
    net, x = Net(BODIES[name]), torch.randn(4, 6)
    expected = _outcome(copy.deepcopy(net), x, train=train)
    graphopt.optimize(net, backend="eager")
    for wanted, actual in zip(expected, _outcome(net, x, train=train), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
