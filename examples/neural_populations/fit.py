"""Fitting: maximum pseudo-likelihood first, then matching of moments with persistent chains.

The likelihood's gradient is the difference between data's and the model's moments, and the latter
need Z. The pseudo-likelihood Σ_i log P(s_i | rest) does not; it is convex and has an ordinary
gradient. From there, chains that are carried on from step to step estimate the model's moments.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.common import Run
from graphopt.examples.neural_populations.model import GibbsSweep, KPairwise, Moments, moments

CHAINS = 3000
BATCH = 2000
COUPLING_PRECISION = 1.0  # of Gaussian priors: they bound pairs that never met
POTENTIAL_PRECISION = 0.01  # and the direction in which h, J and V nearly cancel
_FEWEST = 10  # words that a potential of its own takes
_RATE = 0.1  # of natural gradient steps
_ADAM_RATE = 0.05


def last_resolved(words: Tensor) -> int:
    """The largest K up to which every K occurs in enough words; at least 1."""
    counts = torch.bincount(words.sum(0).long(), minlength=len(words) + 1)
    rare = (counts[1:] < _FEWEST).nonzero()
    return int(rare[0]) + 1 if len(rare) else len(words)


def pseudo_likelihood_loss(odds: Tensor, words: Tensor) -> Tensor:
    """-Σ_i log P(s_i | rest), mean over words of shape [N, B], nats."""
    return F.binary_cross_entropy_with_logits(odds, words, reduction="none").sum(0).mean()


def prior(model: KPairwise, words: int) -> Tensor:
    """-log of the Gaussian priors of J and V, per word, nats."""
    couplings = COUPLING_PRECISION * model.couplings().square().sum() / 2
    potentials = POTENTIAL_PRECISION * model.free.square().sum()
    return (couplings + potentials) / (2 * words)


def fit_pseudo_likelihood(
    run: Run, name: str, model: KPairwise, words: Tensor, steps: int, stream: int
) -> list[float]:
    """Minimise the loss above by Adam, on random minibatches of training words."""
    with torch.no_grad():
        model.fields.copy_(torch.logit(words.mean(1), eps=0.5 / words.shape[1]))
    run.optimize(model)
    words = words.to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=_ADAM_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(words.shape[1], (BATCH,), generator=run.generator(stream + step))
        batch = words[:, chosen.to(run.device)]
        return pseudo_likelihood_loss(model(batch), batch) + prior(model, words.shape[1])

    return run.fit(name, model, optimizer, loss, steps, scheduler=decay)


class MomentMatching(nn.Module):
    """Natural gradient ascent of the likelihood, F^-1 (moments of data - moments of the model).

    F, the covariance of the statistics, is that of the data: what it converges to in a model that
    fits. In its metric steps have one size in all directions, also along the few collective ones
    in which plain gradients oscillate.

    Args:
        model: where to begin.
        words: the training words, shape [N, words].
        states: of the chains at the start, shape [N, C].
    """

    def __init__(self, model: KPairwise, words: Tensor, states: Tensor) -> None:
        super().__init__()
        self.model = model
        n, pairs = len(words), len(words) * (len(words) - 1) // 2
        self.words = words.shape[1]
        start = model.vector().double()
        precision = torch.zeros_like(start)
        precision[n : n + pairs] = COUPLING_PRECISION / self.words
        precision[n + pairs :] = POTENTIAL_PRECISION / self.words
        fisher = covariance(model, words) + precision.diag()
        self._factor = cast("Tensor", torch.linalg.cholesky(fisher))
        self._precision, self._target = precision, model.statistics(moments(words)).double()
        self.states: Tensor
        self.position: Tensor
        self.total: Tensor
        self.register_buffer("states", states)
        self.register_buffer("position", start)
        self.register_buffer("total", torch.zeros_like(start))

    @torch.no_grad()
    def update(self, states: Tensor, found: Moments, rate: float) -> Tensor:
        """One step; returns the mismatch in standard errors of data's moments."""
        self.states = states
        gap = self._target - self.model.statistics(found).double()
        gap -= self._precision * self.position
        step = torch.cholesky_solve(gap[:, None], self._factor)[:, 0]
        self.position += rate * step
        self.model.assign(self.position)
        return (gap @ step * self.words / len(gap)).sqrt()


@torch.no_grad()
def covariance(model: KPairwise, words: Tensor) -> Tensor:
    """Of the statistics over words, in double precision."""
    first, second = torch.triu_indices(len(words), len(words), 1, device=words.device)
    levels = torch.arange(1, model.last + 1, device=words.device)[:, None]  # none if pairwise
    mean, square = torch.zeros(()), torch.zeros(())
    for part in torch.split(words, 4000, 1):
        level = -(part.sum(0).clamp(max=model.last) == levels).to(part.dtype)
        rows = torch.cat([part, part[first] * part[second], level])
        mean = mean + rows.sum(1).double().cpu() / words.shape[1]
        square = square + (rows @ rows.T).double().cpu() / words.shape[1]
    return (square - torch.outer(mean, mean)).to(words.device)


def fit_moments(
    run: Run, name: str, model: KPairwise, words: Tensor, steps: int, stream: int
) -> Tensor:
    """Match moments by ``steps`` sweeps; the result is the mean of the second half.

    Returns:
        The states of all chains at the end, shape [N, C].
    """
    words = words.to(run.device)
    chosen = torch.randint(words.shape[1], (CHAINS,), generator=run.generator(stream))
    matching = MomentMatching(model, words, words[:, chosen.to(run.device)])
    sweep = run.optimize(GibbsSweep(model))
    ones = torch.ones(CHAINS, device=run.device)

    @torch.no_grad()
    def step(number: int) -> Tensor:
        noise = torch.rand(len(words), CHAINS, generator=run.generator(stream + 1 + number))
        states, found = sweep(matching.states, noise.to(run.device), ones)
        mismatch = matching.update(states, Moments(*found), _RATE)
        if number >= steps // 2:
            matching.total += matching.position / (steps - steps // 2)
        if number == steps - 1:
            model.assign(matching.total)
        return mismatch

    run.loop(name, [matching], step, steps)
    return matching.states
