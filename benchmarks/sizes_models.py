"""Seven small models whose sizes, or one number, vary from call to call, with data of any size.

Each takes what users of its kind pass: masks of padded batches, lengths of utterances, edges of
graphs, a timestep. Widths are tiny, since what is asked is which sizes a graph holds for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Batch = Mapping[str, Any]
"""Arguments of a call, by name."""


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
        make: the model, in training.
        batch: of a batch size and a length (or size of images, or number of edges, or timestep).
        loss: of what the model returns.
        lengths: the range that lengths are drawn from.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int, Generator], Batch]
    loss: Callable[[Any], Tensor]
    lengths: range = range(8, 136)


# -- language models -------------------------------------------------------------------------------

VOCABULARY = 64


def gpt2() -> nn.Module:
    """GPT-2, two layers of width 32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, use_cache=False
    )
    config.bos_token_id = config.eos_token_id = 0
    return _labelled(GPT2LMHeadModel(config))


def bert() -> nn.Module:
    """BERT with its masked language model head, two layers of width 32."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return _labelled(BertForMaskedLM(config))


def t5() -> nn.Module:
    """T5, two layers of width 32 in encoder and decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    config.use_cache = False
    return _labelled(T5ForConditionalGeneration(config))


def _labelled(model: Any) -> nn.Module:
    made: nn.Module = model.train()
    return made


def _tokens(batch: int, length: int, random: Generator) -> dict[str, Tensor]:
    """Token ids (batch, length) with a mask of what is no padding; one row is full."""
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=random)
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=random)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def causal(batch: int, length: int, random: Generator) -> Batch:
    """A padded batch whose labels leave padding out."""
    found = _tokens(batch, length, random)
    labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    return {**found, "labels": labels}


def masked(batch: int, length: int, random: Generator) -> Batch:
    """A padded batch in which every seventh token is to be found."""
    found = _tokens(batch, length, random)
    hidden = (torch.arange(length) % 7 == 3) & found["attention_mask"].bool()
    labels = found["input_ids"].masked_fill(~hidden, -100)
    ids = found["input_ids"].masked_fill(hidden, 1)
    return {**found, "input_ids": ids, "token_type_ids": torch.zeros_like(ids), "labels": labels}


def translated(batch: int, length: int, random: Generator) -> Batch:
    """A padded batch and its targets, of another length."""
    targets = _tokens(batch, max(3, (2 * length) // 3 + length % 5), random)
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    return {**_tokens(batch, length, random), "labels": labels}


# -- speech ----------------------------------------------------------------------------------------


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, normalisation.

    Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition" (2020),
    arXiv 2005.08100; without its relative positions.
    """

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.first, self.last = (self._feed_forward(width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.gate = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise = nn.Conv1d(width, width, 1)
        self.dropout = nn.Dropout(0.1)

    @staticmethod
    def _feed_forward(width: int) -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """From (batch, frames, width) to the same; padding (batch, frames) is true behind ends."""
        x = x + 0.5 * self.first(x)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        h = self.norms[1](x).masked_fill(padding[..., None], 0.0).transpose(1, 2)
        h = self.batch_norm(self.depthwise(F.glu(self.gate(h), 1)))
        x = x + self.dropout(self.pointwise(F.silu(h)).transpose(1, 2))
        return self.norms[2](x + 0.5 * self.last(x))


class Conformer(nn.Module):
    """A speech net: convolutions that take a quarter of the frames, blocks, CTC."""

    def __init__(self, bands: int = 16, width: int = 32, symbols: int = 12) -> None:
        super().__init__()
        self.halve = nn.ModuleList(
            nn.Conv2d(inputs, 8, 3, stride=2, padding=1) for inputs in (1, 8)
        )
        self.project = nn.Linear(8 * (bands // 4), width)
        self.blocks = nn.ModuleList(ConformerBlock(width, 4, 5) for _ in range(2))
        self.output = nn.Linear(width, symbols)

    def forward(
        self, features: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """The loss.

        Args:
            features: (batch, frames, bands).
            lengths: (batch,), frames of each utterance.
            targets: (batch, characters).
            target_lengths: (batch,), characters of each utterance.
        """
        x = features[:, None]
        for convolution in self.halve:
            x = F.relu(convolution(x))
            lengths = (lengths + 1) // 2
        x = self.project(x.transpose(1, 2).flatten(2))
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        for block in self.blocks:
            x = block(x, padding)
        logs = F.log_softmax(self.output(x), -1).transpose(0, 1)
        return F.ctc_loss(logs, targets, lengths, target_lengths, zero_infinity=True)


def utterances(batch: int, length: int, random: Generator) -> Batch:
    """Features of 4·length frames at most, and targets of about a third of length."""
    frames = 4 * length + length % 4
    lengths = torch.randint(frames // 2, frames + 1, (batch,), generator=random)
    lengths[0] = frames
    characters = max(2, length // 3)
    return {
        "features": torch.randn(batch, frames, 16, generator=random),
        "lengths": lengths,
        "targets": torch.randint(1, 12, (batch, characters), generator=random),
        "target_lengths": torch.randint(1, characters + 1, (batch,), generator=random),
    }


# -- images and diffusion --------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with group normalisation; the embedding of a timestep is added between."""

    def __init__(self, inputs: int, outputs: int, embedding: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, outputs) for _ in range(2))
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.embed = nn.Linear(embedding, outputs) if embedding else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """From (batch, inputs, height, width) to (batch, outputs, height, width)."""
        h = F.silu(self.norms[0](self.first(x)))
        if self.embed is not None and embedding is not None:
            h = h + self.embed(embedding)[..., None, None]
        return self.skip(x) + F.silu(self.norms[1](self.second(h)))


class UNet(nn.Module):
    """Two halvings of an image of any size, and two doublings with what was there before.

    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation" (2015),
    arXiv 1505.04597.
    """

    def __init__(self, channels: int = 8, embedding: int = 0, norm: bool = True) -> None:
        super().__init__()
        widths = (channels, 2 * channels, 2 * channels)
        befores = (3, *widths[:-1])
        self.down = nn.ModuleList(
            Residual(a, b, embedding) for a, b in zip(befores, widths, strict=True)
        )
        self.up = nn.ModuleList(
            Residual(a, b, embedding)
            for a, b in ((4 * channels, 2 * channels), (3 * channels, channels))
        )
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.out = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """From (batch, 3, height, width) to the same."""
        before = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x, embedding)
            before.append(x)
        for block, skip in zip(self.up, reversed(before[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1), embedding)
        result: Tensor = self.out(self.norm(x))
        return result


class Diffusion(nn.Module):
    """A U-Net that is told how noisy its image is, by an integer timestep.

    Ho et al., "Denoising Diffusion Probabilistic Models" (2020), arXiv 2006.11239.
    """

    frequencies: Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        steps = torch.arange(width // 2) * (-math.log(10_000.0) / (width // 2))
        self.register_buffer("frequencies", steps.exp())
        self.embed = nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, 32))
        self.net = UNet(8, embedding=32, norm=False)

    def forward(self, x: Tensor, t: int) -> Tensor:
        """The noise in x, (batch, 3, height, width), at the timestep t."""
        phases = self.frequencies * t
        embedding = self.embed(torch.cat([phases.sin(), phases.cos()])[None])
        noise: Tensor = self.net(x, embedding)
        return noise


def images(batch: int, length: int, random: Generator) -> Batch:
    """Images whose height is the length, and whose width is another."""
    width = 8 + (7 * length) % 41
    return {"x": torch.randn(batch, 3, length, width, generator=random)}


def noised(batch: int, length: int, random: Generator) -> Batch:
    """Images of one size, at the timestep that is given instead of a length."""
    return {"x": torch.randn(batch, 3, 16, 16, generator=random), "t": length}


# -- graphs ----------------------------------------------------------------------------------------


class GraphLayer(nn.Module):
    """Messages along edges, weighted by attention over the edges that enter a node."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.score = nn.Linear(width, width), nn.Linear(2 * width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Nodes (nodes, width) and edges (2, edges) to nodes."""
        source, target = edges
        h = self.value(x)
        scores = F.leaky_relu(self.score(torch.cat([h[source], h[target]], 1))[:, 0], 0.2)
        top = scores.new_full((x.shape[0],), -torch.inf)
        top = top.scatter_reduce(0, target, scores.detach(), "amax")
        weights = (scores - top[target]).exp()
        total = weights.new_zeros(x.shape[0]).scatter_add(0, target, weights)
        messages = h[source] * (weights / (total[target] + 1e-16))[:, None]
        return self.norm(x + torch.zeros_like(h).index_add(0, target, messages))


class GraphNet(nn.Module):
    """Layers of messages, and a mean over the nodes of each graph of a batch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.layers = nn.ModuleList(GraphLayer(width) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, ptr: Tensor) -> Tensor:
        """One row per graph.

        Args:
            x: (nodes, 6).
            edge_index: (2, edges), positions of nodes.
            batch: (nodes,), which graph a node is of.
            ptr: (graphs + 1,), where each graph begins.
        """
        h = self.embed(x)
        for layer in self.layers:
            h = self.dropout(F.relu(layer(h, edge_index)))
        graphs = ptr.numel() - 1
        sums = h.new_zeros(graphs, h.shape[1]).index_add(0, batch, h)
        counts = (ptr[1:] - ptr[:-1]).to(h.dtype)
        rows: Tensor = self.head(sums / counts[:, None])
        return rows


def graphs(batch: int, length: int, random: Generator) -> Batch:
    """Graphs with about length edges in all."""
    nodes = torch.randint(2, 9, (batch,), generator=random)
    ptr = F.pad(nodes.cumsum(0), (1, 0))
    of = torch.repeat_interleave(torch.arange(batch), nodes)
    count = int(ptr[-1])
    source = torch.randint(0, count, (length + batch,), generator=random)
    shift = torch.randint(0, 9, (length + batch,), generator=random)
    target = ptr[of[source]] + shift % nodes[of[source]]
    x = torch.randn(count, 6, generator=random)
    return {"x": x, "edge_index": torch.stack([source, target]), "batch": of, "ptr": ptr}


def _squared(y: Tensor) -> Tensor:
    return y.square().mean()


CASES: Mapping[str, Case] = {
    "gpt2": Case(gpt2, causal, lambda y: y.loss),
    "bert": Case(bert, masked, lambda y: y.loss),
    "t5": Case(t5, translated, lambda y: y.loss),
    "conformer": Case(lambda: Conformer().train(), utterances, lambda y: y),
    "unet": Case(lambda: UNet().train(), images, _squared, range(16, 144)),
    "graphs": Case(lambda: GraphNet().train(), graphs, _squared),
    "diffusion": Case(lambda: Diffusion().train(), noised, _squared, range(1, 1000)),
}
