"""Sequence models of the corpus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def transformer_encoder() -> Made:
    """Two pre-norm encoder layers with dropout, and a padding mask."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    return model, (torch.randn(2, 6, 16),), {"src_key_padding_mask": mask}


def tied_language_model() -> Made:
    """Causal attention whose output projection is the embedding table; returns its loss."""
    return _TiedLanguageModel(), (torch.randint(0, 20, (2, 7)),), {}


def lstm_ctc() -> Made:
    """A bidirectional LSTM over frames, trained by connectionist temporal classification."""
    frames, targets = torch.randn(3, 12, 6), torch.randint(1, 8, (3, 4))
    return _LstmCtc(), (frames, targets, torch.tensor([4, 3, 2])), {}


def gru_classifier() -> Made:
    """A stacked GRU with dropout between its layers; returns its loss."""
    return _GruClassifier(), (torch.randint(0, 12, (3, 5)), torch.randint(0, 4, (3,))), {}


def embedding_bag() -> Made:
    """Bags of words of unequal length, averaged by one operator."""
    words, offsets = torch.randint(0, 15, (9,)), torch.tensor([0, 2, 5])
    return _EmbeddingBag(), (words, offsets), {}


# -- parts -----------------------------------------------------------------------------------------


class _TiedLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 20, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, -1))
        logits = self.output(x)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class _LstmCtc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 10, batch_first=True, bidirectional=True)
        self.output = nn.Linear(20, 8)

    def forward(self, frames: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        features, _ = self.lstm(frames)
        scores = F.log_softmax(self.output(features), -1).transpose(0, 1)
        lengths = torch.full_like(target_lengths, frames.shape[1])
        return F.ctc_loss(scores, targets, lengths, target_lengths)


class _GruClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.gru = nn.GRU(8, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.output = nn.Linear(8, 4)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        _, state = self.gru(self.embedding(tokens))
        return F.cross_entropy(self.output(state[-1]), labels, label_smoothing=0.1)


class _EmbeddingBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(15, 6, mode="mean")
        self.output = nn.Linear(6, 3)

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        scores: Tensor = self.output(torch.tanh(self.bag(words, offsets)))
        return scores
