"""Texts of captured models: the parsed graph is legal and computes the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphopt.capture import capture
from graphopt.diff import diff_graphs
from graphopt.graph import Graph
from graphopt.testing import inputs_for, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify


class Tokens(nn.Module):
    """Embedding, dropout, batch norm, attention, a branch, autocast, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.BatchNorm1d(8)) for _ in range(2)
        )

    def forward(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.embed(tokens) + x
        for layer in self.layers:
            h = layer(h)
        h = torch.cond(h.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (h,))
        h = h * torch.tensor([1.5, 2.5, 1, 1, 1, 1, 1, -0.0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.layers[0][0](h)
        q = h.view(1, 4, 2, 4)
        attended = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        placed = torch.zeros(4, 8).index_put((torch.tensor([0, 1]),), h[:2])
        return attended.sum(), low, placed


class Images(nn.Module):
    """Convolutions, batch norm, pooling, a change of memory format, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        h = F.gelu(self.second(h)).to(memory_format=torch.channels_last)
        return F.cross_entropy(self.head(F.adaptive_avg_pool2d(h, 1).flatten(1)), label)


class Checkpointed(nn.Module):
    """Two checkpointed regions, one with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.block, x, use_reentrant=False)
        return checkpoint(lambda v: self.last(v).tanh(), h, use_reentrant=False)


class Operators(nn.Module):
    """Random numbers, complex numbers, several results, infinities, a module with an odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict({"a b": nn.Linear(4, 4)})
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("table", torch.randn(4, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        u, v = torch.split(self.by_name["a b"](x), 2, 1)
        noise = torch.rand(2, 4) + torch.randn_like(x) + torch.bernoulli(torch.full_like(x, 0.5))
        best, index = torch.topk(x @ self.table, 3)
        rows = torch.stack(torch.unbind(best, 0)).sort(-1)[0]
        half = torch.arange(4.0, dtype=torch.float64).to(torch.float16).sum()
        return (
            torch.einsum("bi,ji->bj", x, self.weight).pow(2).sum(),
            torch.complex(u, v).abs(),
            noise * half,
            rows,
            torch.where(x > 0, x, float("inf")).clamp(max=1e30),
            torch.gather(x, 1, index.clamp(max=3)),
            F.pad(x, (1, 2), value=float("nan")),
        )


def _images() -> Tensor:
    return torch.randn(2, 1, 10, 10)


CASES = {
    "tokens": (Tokens, lambda: (torch.tensor([1, 2, 3, 4]), torch.randn(4, 8))),
    "images": (Images, lambda: (_images(), torch.tensor([1, 2]))),
    "channels last": (
        Images,
        lambda: (_images().to(memory_format=torch.channels_last), torch.tensor([1, 2])),
    ),
    "checkpointed": (Checkpointed, lambda: (torch.randn(2, 8, requires_grad=True),)),
    "operators": (Operators, lambda: (torch.randn(2, 4, requires_grad=True),)),
}


@pytest.fixture(scope="module", params=CASES)
def graph(request: pytest.FixtureRequest) -> Graph:
    make, inputs = CASES[request.param]
    torch.manual_seed(0)
    return capture(make(), inputs()).graph


def _bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_a_parsed_step_computes_the_same_bits(graph):
    text = print_graph(graph)
    parsed = parse_graph(text, dict(graph.module.named_buffers()))
    assert print_graph(parsed) == text
    assert not diff_graphs(graph, parsed)
    verify(parsed, full=True)
    inputs = inputs_for(graph)
    for read, written in zip(run_graph(parsed, inputs), run_graph(graph, inputs), strict=True):
        assert (read.dtype, read.stride()) == (written.dtype, written.stride())
        assert _bits(read) == _bits(written)


def test_capturing_twice_gives_the_same_text():
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(print_graph(capture(Checkpointed(), (torch.randn(2, 8),)).graph))
    assert texts[0] == texts[1]
    assert "!prefer_recompute:1" in texts[0]
