"""Real images that come with scikit-learn: handwritten digits, alone and on photographs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.extras import extra

with extra("examples", "this example"):
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

SIZE = 8  # height and width of the digits
STRENGTH = 0.3  # of the photograph behind a digit

Batch = tuple[Tensor, Tensor]


@cache
def digits(*, unseen: bool = False) -> Batch:
    """1,437 digits for training or 360 for the test: (n, 1, 8, 8) in [0, 1], and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    chosen = test if unseen else train
    return images[chosen], labels[chosen]


@cache
def photographs() -> Tensor:
    """Two photographs at half their size, (2, 3, 213, 320) in [0, 1].

    Raises:
        ImportError: Pillow, with which scikit-learn reads them, is not installed.
    """
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    return F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 2)


def shifted_digits(seed: int, batch: int, *, unseen: bool = False) -> Iterator[Batch]:
    """Batches of digits, (batch, 1, 8, 8) in [-1, 1], each moved by up to a pixel; never ends.

    Those of the test come in their order, and are not moved.
    """
    images, labels = digits(unseen=unseen)
    draw = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (1, 1, 1, 1))
    while True:
        order = torch.arange(len(images)) if unseen else torch.randperm(len(images), generator=draw)
        for chosen in order.split(batch):
            if len(chosen) == batch:
                top, left = torch.randint(3, (2, batch), generator=draw)
                if unseen:
                    top = left = torch.ones(batch, dtype=torch.int64)
                yield 2 * _pieces(padded, chosen, top, left) - 1, labels[chosen]


def digits_on_photographs(seed: int, batch: int, *, unseen: bool = False) -> Iterator[Batch]:
    """Digits in front of pieces of photographs, (batch, 3, 8, 8) in [-1, 1]; never ends.

    Each colour is the distance of the digit from the photograph, as in MNIST-M (Ganin et al., JMLR
    17, 2016), so that a digit is dark on light and light on dark.
    """
    source = photographs()
    draw = torch.Generator().manual_seed(seed)
    height, width = source.shape[2:]
    for images, labels in shifted_digits(seed, batch, unseen=unseen):
        which = torch.randint(len(source), (batch,), generator=draw)
        top = torch.randint(height - SIZE + 1, (batch,), generator=draw)
        left = torch.randint(width - SIZE + 1, (batch,), generator=draw)
        behind = STRENGTH * _pieces(source, which, top, left)
        yield 2 * (behind - (images + 1) / 2).abs() - 1, labels


def _pieces(source: Tensor, which: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """A square of each of the images `which`, (n, channels, 8, 8)."""
    rows = (top[:, None] + torch.arange(SIZE))[:, :, None]
    columns = (left[:, None] + torch.arange(SIZE))[:, None, :]
    return source[which[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()
