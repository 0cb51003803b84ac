"""Padding that a model minds, and padding that it does not: ``graphopt verify … --padding``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """Attention that is masked, batch norm, and a tag for each position.

    Args:
        masked: whether batch norm takes its statistics at true positions only.
    """

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embed = nn.Embedding(100, 16)
        self.attend = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + self.attend(h, h, h, key_padding_mask=~mask, need_weights=False)[0]
        if self.masked:
            true = self.norm(h[mask])
            h = torch.zeros_like(h).index_put((mask,), true)
        else:
            h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        tags: Tensor = self.head(h)
        return tags


def _batch() -> dict[str, Tensor]:
    return {"ids": torch.randint(1, 100, (4, 12)), "mask": torch.ones(4, 12, dtype=torch.bool)}


def leaking() -> tuple[nn.Module, dict[str, Tensor]]:
    """The tagger whose batch norm averages over padding, and a batch without any."""
    return Tagger(masked=False), _batch()


def tight() -> tuple[nn.Module, dict[str, Tensor]]:
    """The tagger that leaves padding out."""
    return Tagger(masked=True), _batch()
