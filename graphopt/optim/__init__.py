"""Training around the gradient: large batches, and gradients that arrive late.

Plain PyTorch, for any model. For large batches it is the recipe of SP-NGD (Osawa et al., arXiv
2002.06015): schedules, regularisers and their settings. Details follow
its authors' code, github.com/tyohei/chainerkfac; where paper and code differ, both are offered.
For late gradients it is the update rules of pipelined backpropagation (Kosson et al., arXiv
2003.11666) and Adaptive Braking (Venigalla et al., arXiv 2007.01397).
`LARC` and `LARS` scale the step of each layer. `Muon` orthogonalises the updates of matrices; which
parameters these are, and which have no weight decay, is read from the joint graph by
`parameter_roles` and `groups`. `RMSpropWarmup`, `SlowStart` and `linear_scaling` are how Akiba et
al. (arXiv 1711.04325) begin with large batches, and `BatchSchedule` lets batches grow.
"""

from graphopt.optim.batch_rules import Change
from graphopt.optim.batch_schedule import BatchSchedule
from graphopt.optim.class_weights import frequency_weights
from graphopt.optim.delay import (
    accumulated_delay,
    alternating_delay,
    pipelined_delay,
    scale_to_batch,
    spike_compensation,
)
from graphopt.optim.delayed_nadam import delayed_nadam
from graphopt.optim.delayed_sgd import DelayedSGD
from graphopt.optim.erasing import random_erasing
from graphopt.optim.groups import groups
from graphopt.optim.larc import LARC
from graphopt.optim.lars import LARS
from graphopt.optim.mixup import RunningMixup
from graphopt.optim.muon import Muon
from graphopt.optim.quadratic import DelayedQuadratic
from graphopt.optim.rescaling import rescale_weights
from graphopt.optim.roles import ParameterRoles, parameter_roles
from graphopt.optim.schedule import PolynomialDecay, polynomial_decay
from graphopt.optim.settings import SP_NGD, SpNgdSettings
from graphopt.optim.slow_start import SlowStart, linear_scaling, slow_start
from graphopt.optim.smoothing import Smoother
from graphopt.optim.warmup import RMSpropWarmup, sgd_share

__all__ = [
    "LARC",
    "LARS",
    "SP_NGD",
    "BatchSchedule",
    "Change",
    "DelayedQuadratic",
    "DelayedSGD",
    "Muon",
    "ParameterRoles",
    "PolynomialDecay",
    "RMSpropWarmup",
    "RunningMixup",
    "SlowStart",
    "Smoother",
    "SpNgdSettings",
    "accumulated_delay",
    "alternating_delay",
    "delayed_nadam",
    "frequency_weights",
    "groups",
    "linear_scaling",
    "parameter_roles",
    "pipelined_delay",
    "polynomial_decay",
    "random_erasing",
    "rescale_weights",
    "scale_to_batch",
    "sgd_share",
    "slow_start",
    "spike_compensation",
]
