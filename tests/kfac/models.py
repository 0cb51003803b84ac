"""Micro-models: one for each way in which a parameter meets its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ConvHead(nn.Module):
    """A convolution of any kind, tanh, the mean over positions, a linear layer."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.head = nn.Linear(conv.out_channels, 3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(2))


class NormHead(nn.Module):
    """A layer, a norm over its output, tanh, a linear layer at each position, the mean of those."""

    def __init__(self, first: nn.Module, norm: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = norm
        self.head = nn.Linear(4, 3)
        self.channels_last = channels_last
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        h = h if self.channels_last else h.flatten(2).transpose(1, 2).contiguous()
        return self.head(h).mean(1)


class FusedAttention(nn.Module):
    """Queries, keys and values by one linear layer; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(n, t, 4)).mean(1)


class Checkpointed(nn.Module):
    """The hidden layers are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        def hidden(x: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(x))))

        return self.head(checkpoint(hidden, x, use_reentrant=False))


class SharedLinear(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class RawParameters(nn.Module):
    """A linear map without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5) / 2)
        self.b = nn.Parameter(torch.randn(6) / 2)
        self.v = nn.Parameter(torch.randn(3, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.v)


class Lstm(nn.Module):
    """`nn.LSTM` with a head on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class LstmCell(nn.Module):
    """The same by a loop over a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 2)
        for step in range(x.shape[1]):
            h, c = self.cell(x[:, step], (h, c))
        return self.head(h)


class Attention(nn.Module):
    """`nn.MultiheadAttention` on its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_bias.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


class Embedded(nn.Module):
    """A table, the mean over tokens, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.embedding(x)))
        return F.linear(h, self.embedding.weight).flatten(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
