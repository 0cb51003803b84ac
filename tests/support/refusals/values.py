"""Forward decides or draws by what a graph does not hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.refusals.example import Example, Refusal, Small, Way, small, train

# -- decisions -------------------------------------------------------------------------------------


def chooses(s: Small, h: Tensor) -> Tensor:
    if h.sum() > 0:
        return h * 2
    return -h


def halves(s: Small, h: Tensor) -> Tensor:
    while h.norm() > 0.1:
        h = h / 2
    return h


def drops(s: Small, h: Tensor) -> Tensor:
    return h * 2 if torch.rand(()) < 0.5 else h


def drops_layers(self: Small, h: Tensor) -> Tensor:
    if torch.rand(()) < self.layerdrop:
        return h
    return h * 2


def asks(s: Small, h: Tensor) -> Tensor:
    asked = (h > 0).any().item()
    if asked:
        return h * 2
    return -h


def where(s: Small, h: Tensor) -> Tensor:
    return torch.where(h.sum() > 0, h * 2, -h)


BRANCHES = Refusal(
    "branches",
    "branches on the value of a tensor (`if`, `while`; also `nn.init.trunc_normal_`, which does)",
    "the graph would hold one of the ways",
    "`torch.where`, `torch.cond`",
    (
        Example(
            "if",
            small(chooses),
            "ranching",
            "if h.sum() > 0",
            r"torch\.where",
            way=Way(small(where)),
        ),
        Example("while", small(halves), "ranching", "while h.norm()", r"torch\.where"),
        Example("draw", small(drops), "ranching", "torch.rand(())", r"torch\.where"),
        Example("layers", small(drops_layers), "ranching", "self.layerdrop", "layerdrop=0"),
        Example("asked", small(asks), "depends on data", "if asked", r"torch\.where"),
        Example(
            "truncated normal",
            small(lambda s, h: h + nn.init.trunc_normal_(torch.empty(3, 4))),
            "ranching",
            "trunc_normal_",
            way=Way(small(lambda s, h: h + torch.randn(3, 4).clamp(-2, 2)), same=False),
        ),
    ),
)


# -- draws -----------------------------------------------------------------------------------------


def skips(s: Small, h: Tensor) -> Tensor:
    if random.random() < 0.5:
        return h
    return h * 2


def skips_by_own(s: Small, h: Tensor) -> Tensor:
    if s.of_python.random() < 0.5:
        return h
    return h * 2


def of_numpy(s: Small, h: Tensor) -> Tensor:
    return h if np.random.rand() < 0.5 else h * 2


def _draw(name: str, body: Any, words: str, line: str) -> Example:
    by_torch = Way(small(lambda s, h: h * torch.rand(())), same=False)
    return Example(name, small(body), words, line, "^draw by torch.*or draw outside", way=by_torch)


_DRAWS = "forward draws from Python's random numbers or NumPy's, or seeds them"

DRAWS = Refusal(
    "draws",
    "draws from `random` or NumPy (not `random.randint` and `random.uniform`, which are captured), "
    "or from a `random.Random` of its own",
    "the draw would be frozen into the graph",
    "draw with torch, or outside and pass it",
    (
        _draw("branch", skips, _DRAWS, "if random.random() < 0.5"),
        _draw("number", lambda s, h: h * random.random(), _DRAWS, "random.random()"),
        _draw("choice", lambda s, h: h * random.choice([1.0, 2.0]), _DRAWS, "random.choice"),
        _draw("branch by NumPy", of_numpy, _DRAWS, "if np.random.rand() < 0.5"),
        _draw("uniform", lambda s, h: h * np.random.uniform(0, 1), _DRAWS, "np.random.uniform"),
        _draw("beta", lambda s, h: h * np.random.beta(1.0, 1.0), _DRAWS, "np.random.beta"),
        _draw("seed", lambda s, h: h if np.random.seed(0) else h * 2, _DRAWS, "np.random.seed"),
        _draw(
            "permutation",
            lambda s, h: h[torch.from_numpy(np.random.permutation(3))],
            _DRAWS,
            "np.random.permutation",
        ),
        _draw("own", lambda s, h: h * s.of_numpy.random(), _DRAWS, "s.of_numpy.random()"),
        _draw("branch by own", skips_by_own, _DRAWS, "if s.of_python.random() < 0.5"),
        _draw(
            "uniform by own", lambda s, h: h * s.of_python.uniform(0, 1), _DRAWS, "uniform(0, 1)"
        ),
        _draw("shuffle by own", lambda s, h: h * s.of_python.choice([1, 2]), _DRAWS, "choice"),
    ),
)


def forks(s: Small, h: Tensor) -> Tensor:
    with torch.random.fork_rng():
        return h + torch.randn_like(h)


def puts_back(s: Small, h: Tensor) -> Tensor:
    state = torch.get_rng_state()
    h = h + torch.randn_like(h)
    torch.set_rng_state(state)
    return h


def _passed(model: nn.Module) -> object:
    generator = torch.Generator().manual_seed(3)
    return train(model, torch.randn(3, 4, generator=generator))


def _seeds(name: str, body: Any, words: str, line: str, same: bool = False) -> Example:
    way = Way(small(lambda s, h, noise: h + noise), _passed, same)
    return Example(name, small(body), words, line, "^draw outside", way=way)


SEEDS = Refusal(
    "seeds",
    "draws from a `torch.Generator` of its own, or seeds one (`manual_seed`, `fork_rng`)",
    "a graph draws from the default generator only",
    "draw outside and pass it",
    (
        _seeds(
            "generator",
            lambda s, h: h + torch.randn(h.shape, generator=s.generator),
            "torch.Generator of its own",
            "generator=s.generator",
        ),
        _seeds(
            "manual_seed",
            lambda s, h: (torch.manual_seed(5), h + torch.randn_like(h))[1],
            "seeds random numbers",
            "torch.manual_seed(5)",
        ),
        _seeds("fork_rng", forks, "seeds random numbers", "fork_rng()"),
        _seeds("set_rng_state", puts_back, "puts them back", "torch.get_rng_state()"),
    ),
)

VERSIONS = Refusal(
    "versions",
    "reads how often a tensor was changed (`_version`)",
    "the number would be frozen into the graph",
    "count the changes yourself",
    (
        Example(
            "weight",
            small(lambda s, h: h * s.lin.weight._version),
            "_version",
            "weight._version",
            "^count the changes yourself",
            way=Way(small(lambda s, h: h * len(s.kept)), same=False),
        ),
    ),
)

CLASSES = Refusal(
    "classes",
    "calls `F.one_hot` without `num_classes`",
    "the size would depend on data",
    "pass `num_classes`",
    (
        Example(
            "one_hot",
            small(lambda s, h: h * F.one_hot(torch.tensor([0, 3]))[1]),
            "data-dependent",
            "F.one_hot(",
            "^pass num_classes",
            way=Way(small(lambda s, h: h * F.one_hot(torch.tensor([0, 3]), 4)[1])),
        ),
    ),
)

ALL = (BRANCHES, DRAWS, SEEDS, VERSIONS, CLASSES)
