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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import graphopt

EPOCHS = 4
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


def train(model: nn.Module) -> tuple[list[float], list[float], float]:
    """Mean loss of each epoch, seconds of each step, test accuracy."""
    images, labels, test_images, test_labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # dropout
    losses, seconds = [], []
    for _ in range(EPOCHS):
        epoch = []
        for batch in torch.randperm(len(labels), generator=order).split(BATCH):
            if len(batch) < BATCH:
                continue
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            epoch.append(loss.item())
        losses.append(statistics.mean(epoch))
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    model.train()
    return losses, seconds, accuracy


def main() -> None:
    torch.manual_seed(0)
    plain = DigitsNet()
    optimized = graphopt.optimize(copy.deepcopy(plain), backend="eager")

    losses, seconds, accuracy = train(plain)
    own_losses, own_seconds, own_accuracy = train(optimized)

    print("epoch   PyTorch loss          graphopt loss")
    for epoch, (a, b) in enumerate(zip(losses, own_losses, strict=True), 1):
        print(f"{epoch:5}   {a:<20.17f}  {b:<20.17f}  {'equal' if a == b else 'DIFFERENT'}")
    print(f"test accuracy: PyTorch {accuracy:.4f}, graphopt {own_accuracy:.4f}")
    ratio = statistics.median(own_seconds) / statistics.median(seconds)
    print(
        f"median step: PyTorch {1e3 * statistics.median(seconds):.1f} ms, graphopt {ratio:.2f}x\n"
    )
    print(optimized.explain())
    if losses != own_losses or accuracy != own_accuracy:
        raise SystemExit("the two runs differ")


if __name__ == "__main__":
    main()
