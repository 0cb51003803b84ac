"""The baseline in which neurons ignore each other."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.examples.neural_populations.analysis import LN2


class Independent:
    """P(s) = Π_i r_i^s_i (1 - r_i)^(1 - s_i).

    Args:
        words: whose rates r it takes, shape [N, words].
    """

    def __init__(self, words: Tensor) -> None:
        self.rates = words.double().mean(1).clamp(0.5 / words.shape[1], 1 - 0.5 / words.shape[1])

    def bits(self, words: Tensor) -> Tensor:
        """log2-probability of each neuron in each word, shape [N, words]."""
        rates = self.rates[:, None]
        return torch.where(words > 0, rates.log2(), (1 - rates).log2())

    @property
    def entropy(self) -> float:
        """Bits per word."""
        r = self.rates
        return float(-(r * r.log() + (1 - r) * (1 - r).log()).sum()) / LN2

    def synchrony(self) -> Tensor:
        """P(K): neurons are added one by one, shape [N + 1]."""
        p = torch.zeros(len(self.rates) + 1, dtype=torch.float64)
        p[0] = 1
        for rate in self.rates.cpu():
            p[1:] = p[1:] * (1 - rate) + p[:-1] * rate
            p[0] *= 1 - rate
        return p
