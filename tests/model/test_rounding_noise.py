"""How far rounding moves a value that jumps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.model.stress import NOISE, rounding_noise
from graphopt.model.trial import Trial


class Gate(nn.Module):
    """A sum that is barely above 0, and a slope that is another one below."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0 + 3 * 2**-23, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Its slope is 1 or 0."""
        return (self.weight * x).sum().relu()


def test_a_jump_is_found_by_several_changes() -> None:
    x = torch.tensor([1.0, -1.0])
    model = Gate()
    captured = capture(model, (x,))
    trial = Trial(model, (x,), {})
    slopes = []
    for draws in (1, 8):
        noise = rounding_noise(captured.graph, captured.inputs, trial, draws=draws)
        slopes.append(noise["gradient of weight"] / NOISE)
    assert slopes[0] < 1e-5
    assert slopes[1] > 0.5
