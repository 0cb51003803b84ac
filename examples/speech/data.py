"""Utterances as tensors, padded to few lengths so that few shapes are captured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.examples.common import WorkloadError, check_tensor

BANDS = 32
"""Of frequency, in features of any source."""

VOCABULARY = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("stop", "go", "left", "right", "on", "off", "yes", "no", "house", "tree"),
)
SYMBOLS = "_ " + "".join(sorted(set("".join(VOCABULARY))))
"""What a network's outputs stand for: CTC's blank, the space between words, letters."""

FRAMES = (64, 112, 160)
"""Lengths that utterances are padded to."""


@dataclass(frozen=True)
class Corpus:
    """Utterances with what was said, all padded to the last of `FRAMES`.

    Attributes:
        features: (n, frames, BANDS), zero behind an utterance's end.
        lengths: (n,), frames of each utterance.
        targets: (n, most characters), indices into `SYMBOLS`, zero behind the end.
        sizes: (n,), characters of each utterance.
        texts: what was said.
    """

    features: Tensor
    lengths: Tensor
    targets: Tensor
    sizes: Tensor
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, lengths, targets and sizes, with features cut to the least of `FRAMES`."""
        longest = int(self.lengths[indices].max())
        frames = next(f for f in FRAMES if f >= longest)
        parts = (
            self.features[indices, :frames],
            *(self.lengths[indices], self.targets[indices], self.sizes[indices]),
        )
        features, lengths, targets, sizes = (part.to(device) for part in parts)
        return features, lengths, targets, sizes


def corpus(name: str, utterances: Sequence[tuple[Tensor, str]]) -> Corpus:
    """Pad utterances.

    Args:
        name: what they are called in errors.
        utterances: features (frames, BANDS) and text of each.

    Raises:
        WorkloadError: there are none, or one has another shape, holds NaN or infinities, is too
            long, has a text that cannot be spelled, or is too short for it.
    """
    if not utterances:
        raise WorkloadError(f"{name} is empty: it has no utterances", "pass more data")
    features = torch.zeros(len(utterances), FRAMES[-1], BANDS)
    for i, (spoken, text) in enumerate(utterances):
        check_tensor(f"utterance {i} of {name}", spoken, (None, BANDS))
        if len(spoken) > FRAMES[-1]:
            raise WorkloadError(
                f"utterance {i} of {name} has {len(spoken)} frames, more than {FRAMES[-1]}",
                "cut it in two",
            )
        unknown = sorted(set(text) - set(SYMBOLS[1:]))
        if unknown or not text.split():
            raise WorkloadError(
                f"the text of utterance {i} of {name}, {text!r}, "
                + (f"has {unknown[0]!r} in it" if unknown else "has no word"),
                f"use words of the characters {SYMBOLS[2:]!r}",
            )
        repeated = sum(a == b for a, b in itertools.pairwise(text))
        if (len(spoken) + 1) // 2 < len(text) + repeated:
            raise WorkloadError(
                f"utterance {i} of {name} has {len(spoken)} frames, too few for {text!r}",
                "leave it out",
            )
        features[i, : len(spoken)] = spoken
    texts = tuple(text for _, text in utterances)
    targets = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for i, text in enumerate(texts):
        targets[i, : len(text)] = torch.tensor([SYMBOLS.index(c) for c in text])
    return Corpus(
        features,
        torch.tensor([len(spoken) for spoken, _ in utterances]),
        targets,
        torch.tensor([len(text) for text in texts]),
        texts,
    )


def in_order_of_length(lengths: Tensor, batch: int) -> list[Tensor]:
    """Indices of batches of increasing length: SortaGrad's first epoch."""
    order = lengths.argsort(stable=True)
    return list(torch.split(order[: len(order) // batch * batch], batch))


def shuffled(lengths: Tensor, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of random batches in random order, each of utterances padded to the same length.

    What does not fill a batch is padded with the next longer ones.
    """
    buckets = torch.bucketize(lengths, torch.tensor(FRAMES))
    order = torch.randperm(len(lengths), generator=generator)
    order = order[buckets[order].argsort(stable=True)]
    batches = torch.split(order[: len(order) // batch * batch], batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
