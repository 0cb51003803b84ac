"""Inputs that share memory, one of them written, and gradients that share memory: as in eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import CaptureError
from tests.support.as_graph import AsGraph, twins


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a.mul_(2)
        return self.lin(a) + self.lin(b)


class Bank(nn.Module):
    """Writes to a slice of a buffer, and reads the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("bank", torch.zeros(2, 3, 4))
        self.current = self.bank[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.current.copy_(y.detach())
        return y + self.bank.sum()


class Aliased(nn.Module):
    """One buffer is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4))
        self.register_buffer("square", self.count.view(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(x.detach().sum(0))
        return self.lin(x) + self.square.sum()


@pytest.mark.parametrize("kind", [Bank, Aliased])
def test_buffers_that_share_memory(kind: type[nn.Module]) -> None:
    plain = kind()
    graph = AsGraph(copy.deepcopy(plain))
    for _ in range(3):
        x = torch.randn(3, 4)
        assert torch.equal(plain(x), graph(x))
        for a, b in zip(plain.buffers(), graph.model.buffers(), strict=True):
            assert torch.equal(a, b)
    assert len(graph.captures) == 1


@pytest.mark.parametrize("first", ["overlapping", "apart"])
def test_arguments_that_share_memory_in_some_calls(first: str) -> None:
    """A graph for one arrangement is never run on another."""
    plain, graph = twins(Windows())

    def arguments(kind: str) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.arange(20.0).view(5, 4)
        return t, t[:3], t[2:] if kind == "overlapping" else t[2:].clone()

    for kind in (first, "overlapping", "apart", "overlapping"):
        whole, *expected_args = arguments(kind)
        own, *args = arguments(kind)
        expected, actual = plain(*expected_args), graph(*args)
        assert torch.equal(expected, actual)
        assert torch.equal(whole, own)
        for call in (plain, graph.model):
            call.zero_grad()
        expected.square().sum().backward()
        actual.square().sum().backward()
        for p, q in zip(plain.parameters(), graph.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_what_cannot_be_joined_is_refused_by_name() -> None:
    whole = torch.zeros(5, 4)
    with pytest.raises(CaptureError, match=r"shares memory.*'a'.*'b'"):
        capture(Windows(), (whole[:3].view(torch.int32), whole[2:]))
