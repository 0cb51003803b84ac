"""Large-batch training around the gradient: schedules, regularisers and their settings.

Plain PyTorch, for any optimizer and any model; nothing here needs a graph. Most of it is the recipe
of SP-NGD (Osawa et al., arXiv 2002.06015). Details follow its authors' code,
github.com/tyohei/chainerkfac; where paper and code differ, both are offered.
"""

from graphopt.optim.erasing import random_erasing
from graphopt.optim.mixup import RunningMixup
from graphopt.optim.rescaling import rescale_weights
from graphopt.optim.schedule import PolynomialDecay, polynomial_decay
from graphopt.optim.settings import SP_NGD, SpNgdSettings
from graphopt.optim.smoothing import Smoother

__all__ = [
    "SP_NGD",
    "PolynomialDecay",
    "RunningMixup",
    "Smoother",
    "SpNgdSettings",
    "polynomial_decay",
    "random_erasing",
    "rescale_weights",
]
