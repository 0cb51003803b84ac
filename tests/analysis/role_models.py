"""Models whose parameters have roles that are written beside them by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M, C, E, H, N, B, R, X, U = (
    *("matrix", "convolution", "embedding", "head", "norm"),
    *("bias", "rnn", "other", "unused"),
)


class Functional(nn.Module):
    """Raw parameters, their names say nothing; the norm is written out."""

    roles = {"a": M, "b": B, "c": N, "d": N, "e": M, "f": X, "g": H, "h": B}

    def __init__(self) -> None:
        super().__init__()
        shapes = {"a": (8, 6), "b": (8,), "c": (8,), "d": (8,), "e": (8, 8), "f": (8,)}
        for name, shape in {**shapes, "g": (3, 8), "h": (3,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.a, self.b))
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
        x = x * self.c + self.d
        x = torch.tanh(x @ self.e) * self.f  # stored as inputs by outputs
        return F.log_softmax(F.linear(x, self.g, self.h), -1)


class Rms(nn.Module):
    """Gated feed-forward and root-mean-square norms in bfloat16's manner."""

    roles = {"scale": N, "gate.weight": M, "up.weight": M, "down.weight": M, "fused": N, "out": H}

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fused = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=False)
        self.out = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return F.linear(F.rms_norm(x, (8,), self.fused), self.out) / 2


class ConvNet(nn.Module):
    """Plain, grouped, depthwise, dilated one-dimensional and transposed convolutions."""

    roles = {
        **{"first.weight": C, "first.bias": B, "grouped.weight": C, "depth.weight": C},
        **{"norm.weight": N, "norm.bias": N, "up.weight": C, "up.bias": B},
        **{"group.weight": N, "group.bias": N, "line.weight": C, "head.weight": H, "head.bias": B},
    }

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 6)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.line = nn.Conv1d(6, 4, 3, dilation=2, bias=False)
        self.head = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depth(self.grouped(self.first(x)))))
        x = torch.tanh(self.group(self.up(x))).mean(-1)
        logits: Tensor = self.head(torch.tanh(self.line(x)))
        return logits


class Gpt(nn.Module):
    """Learned positions, fused attention, tied embedding, the loss within the model."""

    roles = {
        **{"tokens.weight": E, "positions": B, "norm.weight": N, "norm.bias": N},
        **{"qkv.weight": M, "qkv.bias": B, "project.weight": M, "project.bias": B},
        **{"scale": X, "up.weight": M, "up.bias": B, "down.weight": M, "down.bias": B},
    }

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(16, 8))
        self.norm, self.qkv, self.project = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))  # of a residual branch
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.scale * self.project(y)
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        logits = F.linear(x, self.tokens.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Recurrent(nn.Module):
    """An LSTM with a projection behind another kind of lookup, and its start."""

    roles = {
        **{"table": E, "start": X, "lstm.weight_ih_l0": R, "lstm.weight_hh_l0": R},
        **{"lstm.bias_ih_l0": B, "lstm.bias_hh_l0": B, "head.weight": H, "head.bias": B},
    }

    def __init__(self) -> None:
        super().__init__()
        self.table, self.start = nn.Parameter(torch.randn(9, 5)), nn.Parameter(torch.zeros(1, 1, 7))
        self.lstm, self.head = nn.LSTM(5, 7), nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.start.expand(1, tokens.shape[1], 7).contiguous()
        features, _ = self.lstm(self.table[tokens], (state, state))
        scores: Tensor = self.head(features[-1])
        return scores


class Shared(nn.Module):
    """One matrix in two layers, a penalty on it, low-rank updates, experts, and two heads."""

    roles = {
        **{"mix.weight": M, "mix.bias": B, "base": M, "left": M, "right": M, "experts": M},
        **{"query": M, "key": M, "one.weight": H, "one.bias": B, "two.weight": H, "two.bias": B},
        **{"idle.weight": U, "idle.bias": U, "frozen.weight": U, "frozen.bias": U},
    }

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 1)
        self.idle, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)
        shapes = {"base": (6, 6), "left": (6, 2), "right": (2, 6), "experts": (3, 6, 4)}
        for name, shape in {**shapes, "query": (6, 4), "key": (6, 4)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.tanh(self.mix(torch.tanh(self.mix(self.frozen(x)))))
        x = torch.tanh(F.linear(x, self.base + self.left @ self.right))
        y = torch.bmm(torch.stack([x, -x, x.cos()]), self.experts).sum(0)
        joined = torch.cat([self.query, self.key], 1)
        q, k = (x @ joined).chunk(2, 1)
        x = x + (F.softmax(q @ k.T, -1) @ y) @ self.key.T
        penalty = 1e-3 * self.mix.weight.square().sum()
        return self.one(x), torch.sigmoid(self.two(x)), penalty


class LearnedInputs(nn.Module):
    """Parameters in the place of inputs, a scaled weight, and one that is returned."""

    roles = {
        **{"start": X, "conv.weight": C, "latents": X, "norm.weight": N, "norm.bias": N},
        **{"weight": X, "scale": X, "mix": M, "head.weight": H, "head.bias": B, "back": X},
    }

    def __init__(self) -> None:
        super().__init__()
        self.start, self.conv = (
            nn.Parameter(torch.randn(1, 2, 4, 4)),
            nn.Conv2d(2, 6, 3, bias=False),
        )
        self.latents, self.norm = nn.Parameter(torch.randn(3, 6)), nn.LayerNorm(6)
        self.weight, self.scale = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.ones(6, 1))
        self.mix, self.head = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)
        self.back = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(x + self.conv(self.start).mean((2, 3)))
        x = torch.tanh(F.linear(x, self.weight * self.scale))
        x = F.softmax(x @ self.norm(self.latents).T, -1) @ self.latents
        return self.head(torch.tanh(self.mix @ x.T).T), self.back * 1
