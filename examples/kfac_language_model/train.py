"""Steps and seconds to a validation loss of a character model by seven optimizers.

A small GPT reads Python's own help texts, character by character. The learning rates are those that
`benchmarks.convergence` found with the same number of trials for each method.
Run: ``python examples/kfac_language_model/train.py``; ``--help`` for options.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs from any folder

from examples.kfac_digits.comparison import (
    ADAMW,
    KFAC,
    LARC_SGD,
    LARS_SGD,
    MUON,
    SGD_MOMENTUM,
    TORCH_MUON,
    Batch,
    Task,
)
from examples.kfac_digits.report import main

CONTEXT = 32
BATCH = 32
WIDTH = 64
HEADS = 4
LAYERS = 2
# The loss is a mean over the characters of an example. Its gradients are so many times smaller, and
# their squares, which are the statistics, are one such factor smaller than the curvature. The usual
# damping is divided by it; the learning rates come out smaller as well.
DAMPING = 1e-3 / CONTEXT
RATES = {
    SGD_MOMENTUM: 0.1,
    ADAMW: 3e-3,
    TORCH_MUON: 0.03,
    MUON: 0.03,
    LARC_SGD: 0.3,
    LARS_SGD: 0.1,
    KFAC: 1e-4,
}
SETTINGS = {
    ADAMW: 0.95,
    TORCH_MUON: 0.9,
    MUON: 0.9,
    LARC_SGD: 0.02,
    LARS_SGD: 0.1,
    KFAC: 0.1,
}


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        parts = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterGpt(nn.Module):
    """Logits of the next character, (n, length, characters), from characters, (n, length)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.register_buffer("places", torch.arange(CONTEXT), persistent=False)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, text: Tensor) -> Tensor:
        places = self.places[: text.shape[1]]
        x = self.embedding(text) + self.position(places).expand(text.shape[0], -1, -1)
        return self.head(self.norm(self.blocks(x)))


def characters() -> tuple[Tensor, Tensor, int]:
    """Texts for training and validation as numbers, and the number of different characters."""
    text = "\n".join(topics[name] for name in sorted(topics))
    known = {c: number for number, c in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[c] for c in text])
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(known)


def windows(text: Tensor, starts: Tensor) -> Batch:
    """Pieces of a text and, of each character in them, the next one; both (n, CONTEXT)."""
    at = starts[:, None] + torch.arange(CONTEXT)
    return text[at], text[at + 1]


def loss(logits: Tensor, following: Tensor) -> Tensor:
    """Nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def task() -> Task:
    """Python's help texts to a validation loss."""
    text, unseen, count = characters()
    spread = torch.linspace(0, len(unseen) - CONTEXT - 1, 256).long()
    inputs, answers = windows(unseen, spread)

    def batches(seed: int) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(seed)
        while True:
            yield windows(text, torch.randint(len(text) - CONTEXT, (BATCH,), generator=random))

    def validation(model: nn.Module) -> float:
        return loss(model(inputs), answers).item()

    return Task(
        name="characters",
        model=lambda: CharacterGpt(count),
        batches=batches,
        loss=loss,
        evaluate=validation,
        target=2.3,
        rising=False,
        steps=150,
        every=5,
        kfac=f"kfac{{damping={DAMPING}}}",
        rates=RATES,
        settings=SETTINGS,
    )


if __name__ == "__main__":
    main(task(), __doc__)
