"""Rasters of a population whose synchrony is beyond what pairwise models can make.

A dichotomised Gaussian: neurons sit in the unit square and share correlated Gaussian input, with a
part that falls off with distance and a part that is common to all. A neuron spikes where its input
is above its threshold. Such words are sampled exactly, and have interactions of all orders.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.examples.common import WorkloadError, check_count, check_tensor

MEAN_RATE = 0.055  # spikes per bin
_SPREAD = 0.5  # of the logarithm of rates
_LENGTH = 0.25  # on which correlation falls off, sides of the square
_LOCAL, _COMMON = 0.25, 0.08  # covariance at distance zero; of all pairs


class Population(NamedTuple):
    """Words of one population, each of shape [N, words], zeros and ones.

    Attributes:
        train: what models are fitted to.
        test: what they are judged by.
    """

    train: Tensor
    test: Tensor


def check_raster(name: str, words: Tensor) -> Tensor:
    """Return ``words`` if they are a raster of shape [N, words] with N > 2.

    Raises:
        WorkloadError: empty, of another shape, NaN, or something else than zeros and ones.
    """
    check_tensor(name, words, (None, None))
    if len(words) < 3:
        raise WorkloadError(f"{name} has {len(words)} neurons, expected 3 or more", "record more")
    other = ((words != 0) & (words != 1)).nonzero()
    if len(other):
        raise WorkloadError(
            f"{name} holds {len(other)} values that are neither 0 nor 1, the first at"
            f" {other[0].tolist()}",
            "bin the spikes in shorter bins, or clip counts to 1",
        )
    return words


def population(
    neurons: int, words: int, generator: torch.Generator, *, strength: float = 1.0
) -> Population:
    """Draw a population, and words of it for training and test.

    Args:
        neurons: N.
        words: of each of the two parts.
        generator: of positions, rates and words.
        strength: of the shared input. With 1 the mean correlation of spikes is 0.035, with 2.35
            it is 0.10.
    """
    check_count("words", words)
    if not 0 <= strength * (_LOCAL + _COMMON) < 1:
        raise WorkloadError(f"strength {strength} leaves no own noise", "give one below 3")
    places = torch.rand(neurons, 2, generator=generator, dtype=torch.float64)
    shared = strength * (_LOCAL * torch.exp(-torch.cdist(places, places) / _LENGTH) + _COMMON)
    shared.fill_diagonal_(1.0)
    rates = torch.exp(_SPREAD * torch.randn(neurons, generator=generator, dtype=torch.float64))
    rates *= MEAN_RATE / rates.mean()
    thresholds = math.sqrt(2) * torch.erfinv(1 - 2 * rates)
    noise = torch.randn(neurons, 2 * words, generator=generator, dtype=torch.float64)
    spikes = torch.linalg.cholesky(shared) @ noise > thresholds[:, None]
    train, test = spikes.float().split(words, 1)
    return Population(check_raster("training words", train), check_raster("test words", test))
