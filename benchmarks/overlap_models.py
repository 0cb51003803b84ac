"""What the overlap benchmark trains: one compute-light, three convolutional, one tied model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import ResNet18
from graphopt.examples.materials_imaging.data import make_specimens
from graphopt.examples.materials_imaging.model import huber_loss, small_net


@dataclass(frozen=True)
class Case:
    """A model with one batch; the batch differs between ranks, the weights do not.

    Attributes:
        model: in training mode.
        inputs: what the model is called with.
        loss: of the model's output.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[[Tensor], Tensor]


class MLP(nn.Module):
    """Ten linear layers of 1024 x 1024: 42 MB of gradients, all of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


class DenseLayer(nn.Module):
    """Batch norm, 1x1 and 3x3 convolution; the result is appended to the input's channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(h)))], 1)


class DenseNet121(nn.Module):
    """DenseNet-121 for 1000 classes: 364 gradients, most of them small, 32 MB."""

    def __init__(self, growth: int = 32) -> None:
        super().__init__()
        width = 2 * growth
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        for stage, depth in enumerate((6, 12, 24, 16)):
            if stage:
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                width //= 2
            layers += [DenseLayer(width + i * growth, growth) for i in range(depth)]
            width += depth * growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class TransformerLayer(nn.Module):
    """Causal self-attention and a two-layer MLP, each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, 2)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Like GPT-2, with four layers; one matrix embeds and gives the output: it is ready last."""

    def __init__(self, vocabulary: int = 8192, width: int = 256, context: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.Sequential(*(TransformerLayer(width, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens) + self.positions)))


def _images(model: nn.Module, batch: int) -> Case:
    labels = torch.randint(1000, (batch,))
    return Case(model, (torch.randn(batch, 3, 64, 64),), lambda out: F.cross_entropy(out, labels))


def _tokens(model: nn.Module) -> Case:
    tokens = torch.randint(8192, (4, 64))
    return Case(model, (tokens,), lambda out: F.cross_entropy(out.flatten(0, 1), tokens.flatten()))


def _specimens(model: nn.Module) -> Case:
    data = make_specimens(4, torch.Generator().manual_seed(torch.initial_seed()))
    data = data.prepared(data.patterns.mean(0), 0.1)
    return Case(model, (data.patterns,), lambda out: huber_loss(out, data.potential))


# The model is built first, from a seed that all ranks share, then the batch, from a seed per rank.
_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Case]]] = {
    "mlp": (MLP, lambda m: Case(m, (torch.randn(128, 1024),), lambda out: out.square().mean())),
    "resnet18": (ResNet18, lambda m: _images(m, 16)),
    "densenet": (DenseNet121, lambda m: _images(m, 8)),
    "transformer": (Transformer, _tokens),
    "fc_densenet": (small_net, _specimens),
}
MODELS = tuple(_MODELS)


def case(name: str, rank: int) -> Case:
    """The model of this name, with the same weights on all ranks, and this rank's batch."""
    make, batch = _MODELS[name]
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(100 + rank)
    return batch(model)
