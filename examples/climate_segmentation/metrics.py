"""How well labels are predicted, class by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphopt.examples.climate_segmentation.data import CLASSES, Fields

CYCLONE = CLASSES.index("tropical cyclone")


@dataclass(frozen=True)
class Scores:
    """Of predictions on some fields.

    Attributes:
        confusion: [classes, classes], points by true label and predicted one.
    """

    confusion: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the points with the right label."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum())

    @property
    def iou(self) -> list[float]:
        """Intersection over union of each class; 0 where a class neither is nor is predicted."""
        hits = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return (hits / union.clamp(min=1)).tolist()

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes."""
        return sum(self.iou) / len(self.iou)

    @property
    def recall(self) -> list[float]:
        """Share of the points of each class that are found."""
        return (self.confusion.diagonal() / self.confusion.sum(1).clamp(min=1)).tolist()


def confusion(labels: Tensor, predicted: Tensor) -> Tensor:
    """Count points by true and predicted label; both [...], integers."""
    count = len(CLASSES)
    pairs = count * labels.flatten() + predicted.flatten()
    return torch.bincount(pairs, minlength=count**2).view(count, count).double()


@torch.no_grad()
def predict(model: nn.Module, fields: Fields, batch: int = 16) -> Tensor:
    """The most likely class of every point, [n, height, width], in evaluation mode."""
    training = model.training
    model.eval()
    found = [model(values).argmax(1) for values in torch.split(fields.values, batch)]
    model.train(training)
    return torch.cat(found)
