"""A model of habits and a run of steps with it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.testing.fuzz import layers, state
from graphopt.testing.fuzz.around import AROUND
from graphopt.testing.fuzz.layers import WIDTH

KINDS: dict[str, type[nn.Module]] = {
    made.__name__: made
    for made in (
        *(layers.Linear, layers.Normalised, layers.Drops, layers.Noisy, layers.Attention),
        *(layers.Recurrent, layers.Lookup, layers.AddsInPlace, layers.Masks, layers.Scatters),
        *(layers.WritesWhatItGets, layers.OwnGradient, layers.ChangesGradient, layers.Selects),
        *(layers.Counts, layers.Checks, layers.WithoutGradient, layers.Mixed),
        *(state.Counter, state.CountsOnly, state.Annealed, state.Average, state.Reassigned),
        *(state.Momentum, state.Remembers, state.Carries, state.History, state.Named),
        *(state.Alternates, state.Logs, state.Lazy, state.DrawsPython),
    )
}
"""Layers that are captured, by name."""

REFUSED_KINDS: dict[str, type[nn.Module]] = {
    made.__name__: made for made in (state.DrawsNumpy, state.DropsItself, state.OwnGenerator)
}
"""Layers that one graph cannot hold."""

OUTPUTS = ("tensor", "tuple", "dict", "loss")
"""Forms of what the model returns."""


@dataclass(frozen=True)
class Layer:
    """One layer, by the name of its kind, and what is around it."""

    kind: str
    around: str = ""

    def build(self) -> nn.Module:
        """Make it; draws from torch's random stream."""
        kind = KINDS.get(self.kind) or REFUSED_KINDS[self.kind]
        return AROUND[self.around](kind())


@dataclass(frozen=True)
class Step:
    """One training step: how the model is called, and what the loop does afterwards.

    Attributes:
        use: a key of `uses.USES`.
        after: a key of `between.AFTER`.
        batch: rows of the input.
        training: whether the model is in train mode.
    """

    use: str = "once"
    after: str = "sgd"
    batch: int = 3
    training: bool = True


@dataclass(frozen=True)
class Scenario:
    """A whole run.

    Attributes:
        layers: of the model, in order.
        steps: of the run.
        output: the form of what the model returns, one of `OUTPUTS`.
        tied: whether all linear layers of one shape share their weight.
        seed: of the weights and of the data.
    """

    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    output: str = "tensor"
    tied: bool = False
    seed: int = 0

    def build(self) -> nn.Module:
        """The model; the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = Composed([layer.build() for layer in self.layers], self.output)
            if self.tied:
                _tie(model)
            return model


class Composed(nn.Module):
    """Layers one after the other."""

    def __init__(self, parts: list[nn.Module], output: str) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.parts, self.output = nn.ModuleList(parts), output

    def forward(self, x: Tensor) -> Any:  # noqa: D102
        features = None
        h = x
        for index, part in enumerate(self.parts):
            h = part(h)
            features = h if index == 0 else features
        h = self.first(h)
        if self.output == "tuple":
            return h, features
        if self.output == "dict":
            return {"out": h, "loss": h.square().mean(), "nothing": None}
        return h.square().mean() if self.output == "loss" else h


def _tie(model: nn.Module) -> None:
    """Give linear layers of one shape one weight, where nothing else has a hand on it."""
    plain = [m for m in model.modules() if type(m) is nn.Linear]
    for module in plain[1:]:
        if module.weight.shape == plain[0].weight.shape:
            module.weight = plain[0].weight
