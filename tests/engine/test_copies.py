"""What a backward can copy or compute anew from less is not saved; nothing of it shows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from benchmarks.memory import of_step
from benchmarks.zoo import Step
from graphopt.ops.record import Invocation

X = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))


class Grouped(nn.Module):
    """Attention of four heads with two keys each, and a mask of positions, both spelled out."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q = self.q(x).view(2, n, 4, 8).transpose(1, 2)
        keys, values = (
            t.view(2, n, 2, 8).transpose(1, 2)[:, :, None].expand(2, 2, 2, n, 8).reshape(2, 4, n, 8)
            for t in (self.k(x), self.v(x))
        )
        scores = q @ keys.transpose(-1, -2)
        if self.masked:
            place = torch.arange(n)
            allowed = place[:, None] >= place[None, :]
            scores = scores * torch.where(allowed, 1.0, 0.5)
        return scores.softmax(-1) @ values


@pytest.mark.parametrize("masked", [False, True])
def test_keys_are_saved_once_and_masks_are_not(masked: bool) -> None:
    torch.manual_seed(0)
    plain = Grouped(masked)
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager", verify="off")
    held = [of_step(Step(m, (X,), {}, lambda o: o.square().sum())) for m in (plain, ours)]
    copies = 2 * 2 * 2 * 16 * 8 * 4  # half of the keys and of the values, four bytes each
    assert held[1]["saved"] <= held[0]["saved"] - copies - 4 * 16 * 16 * masked
    assert held[1]["peak"] <= held[0]["peak"]
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": lambda t: t.unsqueeze(1).expand(-1, 3, *[-1] * (t.dim() - 1)),
    "flatten": lambda t: t.flatten(0, 1) if t.dim() > 1 else t,
    "transpose": lambda t: t.transpose(0, -1),
    "clone": lambda t: t.clone(memory_format=torch.contiguous_format),
    "half": lambda t: t[: max(1, len(t) // 2)],
}


class Moved(nn.Module):
    """Values that are moved about, and what comes of them saved for a product."""

    def __init__(self, moves: list[str], on_input: bool) -> None:
        super().__init__()
        self.layer, self.moves, self.on_input = nn.Linear(4, 4), moves, on_input

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        other = x if self.on_input else h
        for move in self.moves:
            h, other = MOVES[move](h), MOVES[move](other)
        return h * other * (torch.arange(h.shape[0]) > 0).view(-1, *[1] * (h.dim() - 1))


@settings(max_examples=12)
@given(moves=st.lists(st.sampled_from(list(MOVES)), min_size=1, max_size=4), on_input=st.booleans())
def test_gradients_are_those_of_eager(moves: list[str], on_input: bool) -> None:
    torch.manual_seed(0)
    plain = Moved(moves, on_input)
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager", verify="off")
    for model in (plain, ours):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


class OfInput(nn.Module):
    """Saves a copy of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        copies = x[None].expand(2, -1).clone()
        return F.relu(self.weight * copies)


def test_an_input_may_change_before_the_backward() -> None:
    plain = OfInput()
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager", verify="off")
    for model in (plain, ours):
        x = torch.tensor([1.0, 2.0, 3.0])
        out = model(x)
        x.zero_()
        out.sum().backward()
    assert torch.equal(plain.weight.grad, torch.full((2, 1), 6.0))
    assert torch.equal(ours.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_runs_once_per_step(
    layer: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first state is zeros: were they made anew, its record would be one of other tensors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    runs: list[object] = []
    record = Invocation.record

    def counted(self: Invocation, wanted: list[bool]) -> object:
        runs.append(self)
        return record(self, wanted)

    monkeypatch.setattr(Invocation, "record", counted)
    model = graphopt.optimize(Net(), passes="cleanup", backend="eager", cache="off")
    for _ in range(3):
        runs.clear()
        model(torch.randn(2, 5, 4)).sum().backward()
    assert len(runs) == 1
