"""Accuracy in evaluation: batch norms with moving averages, and with statistics of last steps.

A small convolutional network on scikit-learn's digits, by SGD with momentum, for several sizes of
batches. Training is the same in all variants, bit for bit; what differs is what the norms evaluate
with. Kept is the accuracy on held-out digits after each epoch. Run:
``python -m benchmarks.batch_statistics [--seeds N]``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt
from benchmarks.harness import keep

TRAINED = 1400
# Examples per batch, learning rate, epochs.
SETTINGS = ((16, 0.05, 3), (64, 0.2, 4), (350, 0.8, 6), (1400, 1.0, 12))
VARIANTS = {
    "moving averages": "cleanup",
    **{f"last={k}": f"cleanup,batch_statistics{{last={k}}}" for k in (1, 4, 16)},
}


def _data() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(data.target)[order]


def _net() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), *head)


def _train(size: int, rate: float, epochs: int, spec: str, seed: int) -> list[float]:
    """Accuracies in percent, after each epoch."""
    images, labels = _data()
    torch.manual_seed(seed)
    model: Any = graphopt.optimize(_net(), passes=spec, backend="eager", verify="off")
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    found = []
    for _ in range(epochs):
        order = torch.randperm(TRAINED)
        for rows in order.split(size)[: TRAINED // size]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = model(images[TRAINED:]).argmax(1) == labels[TRAINED:]
        model.train()
        found.append(round(100 * float(right.double().mean()), 2))
    return found


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    rows = []
    for size, rate, epochs in SETTINGS:
        for name, spec in VARIANTS.items():
            # The first three seeds were looked at when the default was chosen.
            runs = [_train(size, rate, epochs, spec, seed) for seed in range(3, 3 + seeds)]
            mean = torch.tensor(runs).mean(0)
            row = {"batch": size, "learning rate": rate, "variant": name, "accuracy": runs}
            rows.append(row)
            print(size, name, [round(float(value), 1) for value in mean], flush=True)
    print(keep("batch_statistics", rows))


if __name__ == "__main__":
    main()
