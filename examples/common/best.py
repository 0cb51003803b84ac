"""The weights that did best on validation data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Best:
    """Keeps the weights of a model with the lowest value so far; a part of a loop that is resumed.

    Attributes:
        value: the lowest so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.value = float("inf")
        self._model = model
        self._weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def offer(self, value: float) -> None:
        """Keep the present weights if they are better (lower)."""
        if value < self.value:
            self.value = value
            for name, p in self._model.named_parameters():
                self._weights[name].copy_(p.detach())

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its best weights."""
        for name, p in self._model.named_parameters():
            p.copy_(self._weights[name])

    def state_dict(self) -> dict[str, Any]:
        """The value and the weights."""
        return {"value": self.value, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from them; the state that was given stays as it is."""
        self.value = state["value"]
        for name, weight in state["weights"].items():
            self._weights[name].copy_(weight)
