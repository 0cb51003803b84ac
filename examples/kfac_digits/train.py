"""Steps and seconds to 98 % on scikit-learn's digits by seven optimizers, K-FAC among them.

A small convolutional network with batch norm. The learning rates are those that
`benchmarks.convergence` found with the same number of trials for each method.
Run: ``python examples/kfac_digits/train.py``; ``--help`` for options.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

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
from graphopt.extras import extra

with extra("examples", "this example"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

BATCH = 128
RATES = {
    SGD_MOMENTUM: 0.1,
    ADAMW: 3e-3,
    TORCH_MUON: 0.01,
    MUON: 0.01,
    LARC_SGD: 0.3,
    LARS_SGD: 1.0,
    KFAC: 3e-3,
}
SETTINGS = {SGD_MOMENTUM: 0.8, ADAMW: 0.95, TORCH_MUON: 0.9, MUON: 0.9, LARS_SGD: 0.01}


def network() -> nn.Module:
    """Two convolutions and two linear layers: 75,000 parameters, nine in ten of them in one."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, validation images and labels; images are (n, 1, 8, 8)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, rest = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0)
    return images[train], labels[train], images[rest], labels[rest]


def task() -> Task:
    """Digits to 98 % of the validation images."""
    images, labels, unseen, answers = digits()

    def batches(seed: int) -> Iterator[Batch]:
        order = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(labels), generator=order).split(BATCH):
                if len(chosen) == BATCH:
                    yield images[chosen], labels[chosen]

    def accuracy(model: nn.Module) -> float:
        return (model(unseen).argmax(1) == answers).float().mean().item()

    return Task(
        name="digits",
        model=network,
        batches=batches,
        loss=F.cross_entropy,
        evaluate=accuracy,
        target=0.98,
        rising=True,
        steps=132,  # 12 times all images
        every=2,
        kfac="kfac",
        rates=RATES,
        settings=SETTINGS,
    )


if __name__ == "__main__":
    main(task(), __doc__)
