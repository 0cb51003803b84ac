r"""The K-pairwise maximum entropy model of a neural population, and one sweep of Gibbs sampling.

A word s of zeros and ones says which of N neurons spiked in a time bin, and K = Σ s_i how many.
Among all distributions with given means, pairwise moments and P(K), the one of largest entropy is

.. math:: P(s) = Z^{-1} \exp\{Σ_i h_i s_i + Σ_{i<j} J_{ij} s_i s_j - V_K\} = Z^{-1} e^{-E(s)}.

Words are rasters of shape [N, B]: a row per neuron, a column per time bin or per Markov chain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """What the model is fitted to, as averages over words.

    Attributes:
        means: of s_i, shape [N].
        pairs: of s_i s_j, shape [N, N].
        counts: P(K), shape [N + 1].
    """

    means: Tensor
    pairs: Tensor
    counts: Tensor


def moments(words: Tensor) -> Moments:
    """Averages over the columns of a raster of shape [N, B]."""
    count = words.sum(0)
    levels = torch.arange(len(words) + 1, device=words.device)
    histogram = (count == levels[:, None]).to(words.dtype).mean(1)
    return Moments(words.mean(1), words @ words.T / words.shape[1], histogram)


class KPairwise(nn.Module):
    """Energy and conditional distributions.

    V_0 = 0, so that silence has no energy. Synchrony that the data do not resolve has one common
    value: V_K is V_last for all K ≥ last. (Adding bK + cK² to all of V is undone by h and J; here
    only the common value at the end and the priors of a fit tell such models apart.)

    Args:
        neurons: N.
        last: the largest K with a potential of its own; 0 leaves the pairwise model, V = 0.
    """

    def __init__(self, neurons: int, last: int = 0) -> None:
        super().__init__()
        if not 0 <= last <= neurons:
            raise ValueError(f"last is {last}, expected 0 to {neurons}, the number of neurons")
        self.neurons, self.last = neurons, last
        self.fields = nn.Parameter(torch.zeros(neurons))
        self.upper = nn.Parameter(torch.zeros(neurons, neurons))  # what is above its diagonal
        self.free = nn.Parameter(torch.zeros(last))

    def couplings(self) -> Tensor:
        """J, symmetric with a zero diagonal, shape [N, N]."""
        upper = self.upper.triu(1)
        return upper + upper.T

    def potential(self) -> Tensor:
        """V_0 ... V_N, shape [N + 1]."""
        levels = torch.cat([self.fields.new_zeros(1), self.free])
        return torch.cat([levels, levels[-1].expand(self.neurons - self.last)])

    def forward(self, words: Tensor) -> Tensor:
        r"""Log-odds of a spike of each neuron, given all others in the same bin.

        .. math:: \log\frac{P(s_i=1|rest)}{P(s_i=0|rest)}
            = h_i + Σ_j J_{ij} s_j - (V_{M+1} - V_M), \quad M = Σ_{j≠i} s_j

        Args:
            words: shape [N, B], zeros and ones.

        Returns:
            Shape [N, B].
        """
        pairwise = self.fields[:, None] + self.couplings() @ words
        rise = self.potential().diff()
        count = words.sum(0).long()
        silent = rise[count.clamp(max=self.neurons - 1)]  # K without a neuron that is silent
        spiking = rise[(count - 1).clamp(min=0)]
        return pairwise - torch.where(words > 0, spiking, silent)

    def energy(self, words: Tensor) -> Tensor:
        """E(s), zero for silence: shape [B] for words of shape [N, B]."""
        pairs = (words * (self.couplings() @ words)).sum(0) / 2
        return self.potential()[words.sum(0).long()] - self.fields @ words - pairs

    def statistics(self, m: Moments) -> Tensor:
        """The derivative of the mean log-probability by `parameters`, but for log Z."""
        index = torch.triu_indices(self.neurons, self.neurons, 1, device=m.pairs.device)
        levels = m.counts[1 : self.last + 1].clone()
        if self.last:
            levels[-1] = m.counts[self.last :].sum()
        return torch.cat([m.means, m.pairs[index[0], index[1]], -levels])

    @torch.no_grad()
    def vector(self) -> Tensor:
        """h, J_ij for i < j, and the free V_K, in the order of `statistics`."""
        index = torch.triu_indices(self.neurons, self.neurons, 1)
        return torch.cat([self.fields, self.upper[index[0], index[1]], self.free])

    @torch.no_grad()
    def assign(self, vector: Tensor) -> None:
        """Take parameters in the order of `vector`."""
        n = self.neurons
        index = torch.triu_indices(n, n, 1)
        pairs = n * (n - 1) // 2
        self.fields.copy_(vector[:n])
        self.upper[index[0], index[1]] = vector[n : n + pairs].to(self.upper)
        self.free.copy_(vector[n + pairs :])


class GibbsSweep(nn.Module):
    """Draws every neuron once, in order, given all others: one step of many Markov chains."""

    def __init__(self, model: KPairwise) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, states: Tensor, uniforms: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Moments]:
        """The next states and their moments.

        A neuron spikes if u < sigmoid(log-odds / T), which is T logit(u) < log-odds.

        Args:
            states: one chain per column, shape [N, C].
            uniforms: numbers between 0 and 1, shape [N, C].
            temperature: T of P ∝ exp(-E / T), one per chain, shape [C].
        """
        states = states.clone()
        thresholds = temperature * torch.logit(uniforms) - self.model.fields[:, None]
        couplings, rise = self.model.couplings(), self.model.potential().diff()
        count = states.sum(0)
        for i in range(self.model.neurons):
            others = count - states[i]
            odds = couplings[i] @ states - rise[others.long()]
            states[i] = (thresholds[i] < odds).to(states.dtype)
            count = others + states[i]
        return states, moments(states)
