"""Switches of cuDNN in forward, on a machine where nothing reads them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt


class Speech(nn.Module):
    """A CTC loss with cuDNN switched off around it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 6)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logs = self.lin(x).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        with torch.backends.cudnn.flags(enabled=False):
            return F.ctc_loss(logs, labels, lengths, torch.full_like(lengths, labels.shape[1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the switch has an effect")
def test_equals_eager() -> None:
    torch.manual_seed(0)
    net, x, labels = Speech(), torch.randn(2, 8, 4), torch.randint(1, 6, (2, 3))
    plain = copy.deepcopy(net)
    graphopt.optimize(net, backend="eager")
    for model in (plain, net):
        model(x, labels).backward()
    for wanted, actual in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=0, atol=0)
    assert torch.backends.cudnn.enabled
