"""Train a small ResNet on scikit-learn's digits twice from one seed and compare.

Once by PyTorch alone, once through `graphopt.optimize`; the loop, the loss and the optimizer are
the same lines. Prints both loss curves, the test accuracies, the ratio of the step times and what
graphopt did to the graph. Run: ``python examples/train_digits.py``
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.extras import extra

with extra("examples", "this example"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

EPOCHS = 8
BATCH = 64


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A ResNet for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.stem(x)))
        return self.head(self.dropout(h.mean((2, 3))))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; images are (n, 1, 8, 8) in [0, 1]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0)
    return images[train], labels[train], images[test], labels[test]


class Run:
    """One model with its own optimizer, and what is noted about its training."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            return (self.model(images).argmax(1) == labels).float().mean().item()


def train(runs: list[Run], images: Tensor, labels: Tensor) -> int:
    """Train all runs on the same batches, step by step, so that their times can be compared."""
    order = torch.Generator().manual_seed(1)
    batches = [
        batch
        for _ in range(EPOCHS)
        for batch in torch.randperm(len(labels), generator=order).split(BATCH)
        if len(batch) == BATCH
    ]
    for number, batch in enumerate(batches):
        for run in runs:
            torch.manual_seed(number)  # the same dropout for each
            run.step(images[batch], labels[batch])
    return len(batches) // EPOCHS


def main() -> None:
    torch.manual_seed(0)
    model = DigitsNet()
    plain, own = Run(copy.deepcopy(model)), Run(graphopt.optimize(model, backend="eager"))
    images, labels, *test = digits()
    per_epoch = train([plain, own], images, labels)

    print("epoch   PyTorch loss          graphopt loss")
    for epoch in range(EPOCHS):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        a, b = statistics.mean(plain.losses[part]), statistics.mean(own.losses[part])
        same = "equal" if plain.losses[part] == own.losses[part] else "DIFFERENT"
        print(f"{epoch + 1:5}   {a:<20.17f}  {b:<20.17f}  {same}")
    accuracies = plain.accuracy(*test), own.accuracy(*test)
    print("test accuracy: PyTorch {:.4f}, graphopt {:.4f}".format(*accuracies))
    ratios = [b / a for a, b in zip(plain.seconds[1:], own.seconds[1:], strict=True)]
    print(
        f"step time: PyTorch {1e3 * statistics.median(plain.seconds):.1f} ms, graphopt "
        f"{statistics.median(ratios):.2f}x (median of {len(ratios)} paired ratios)\n"
    )
    print(own.model.explain())
    if plain.losses != own.losses or accuracies[0] != accuracies[1]:
        raise SystemExit("the two runs differ")


if __name__ == "__main__":
    main()
