"""Weights of classes against shares counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.errors import ArgumentError
from graphopt.optim import frequency_weights

# Shares of 16/25, 8/25 and 1/25, with square roots of 4/5, 0.5657 and 1/5.
LABELS = torch.tensor([0] * 16 + [1] * 8 + [2])


def test_closed_values() -> None:
    root = [1.25, 1 / 0.32**0.5, 5.0]
    mean = 0.64 * root[0] + 0.32 * root[1] + 0.04 * root[2]
    expected = torch.tensor([r / mean for r in root])
    torch.testing.assert_close(frequency_weights(LABELS, 3), expected)
    expected = torch.tensor([25 / 48, 25 / 24, 25 / 3])
    torch.testing.assert_close(frequency_weights(LABELS.view(5, 5), 3, power=1), expected)
    assert torch.equal(frequency_weights(LABELS, 3, power=0), torch.ones(3))


def test_losses_have_the_scale_of_those_without_weights() -> None:
    """A model that knows nothing has the loss log(classes) with any weights."""
    for power in (0, 0.5, 1):
        weights = frequency_weights(LABELS, 3, power=power)
        loss = F.cross_entropy(torch.zeros(25, 3), LABELS, weights, reduction="none").mean()
        assert float(loss) == pytest.approx(1.0986123, rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "classes", "power", "says"),
    [
        (torch.tensor([0, 0, 2]), 3, 0.5, "class 1 has no point"),
        (torch.tensor([1, 1, 1]), 3, 0.5, "all points are of class 1"),
        (torch.tensor([0, 1, 255]), 2, 0.5, "go from 0 to 255, and there are 2 classes"),
        (torch.tensor([-1, 1, 0]), 2, 0.5, "go from -1 to 1"),
        (torch.tensor([0.0, 1.0]), 2, 0.5, "torch.float32"),
        (torch.zeros(0, dtype=torch.long), 2, 0.5, r"\(0,\)"),
        (torch.tensor([0, 1]), 1, 0.5, "1 classes"),
        (torch.tensor([0, 1]), 2, 2.0, "power of 2.0"),
    ],
)
def test_bad_labels(labels: Any, classes: int, power: float, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        frequency_weights(labels, classes, power=power)
