"""The first call, which runs eager and compares, has no more at once than a step of eager.

Bytes are those of torch's allocator. The models are wide enough for the few kilobytes of a random
stream's state, and of constants of the capture, not to matter.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.model.comparison import Difference, Observed, differences
from graphopt.model.surface import report
from graphopt.model.trial import Trial
from tests.support.bytes import most

SHARE = 1.01


class Language(nn.Module):
    """Returns a loss and the logits that it is made from."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 256)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedding(tokens)
        logits = self.head(self.norm(h + self.layers(h)))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), logits


class Images(nn.Module):
    """Its weights are small beside what its layers save."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.norm(self.first(x)).relu())
        return self.head(h.relu().mean((2, 3)))  # type: ignore[no-any-return]


class Wide(nn.Module):
    """Its gradients are most of what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "language": (Language, lambda: torch.randint(0, 256, (8, 32))),
    "images": (Images, lambda: torch.randn(4, 3, 24, 24)),
    "wide": (Wide, lambda: torch.randn(8, 256)),
}


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        found = model(x)
        loss = found[0] if isinstance(found, tuple) else found.square().mean()
        del found  # as the loss alone is differentiated
        loss.backward()

    return run


def shares(name: str) -> tuple[nn.Module, float]:
    """The optimized model, and the most of its first call over that of a step of eager."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()
    plain = copy.deepcopy(model)
    step(plain, x)()
    eager = most(step(plain, x))
    plain.zero_grad()
    graphopt.optimize(model, backend="eager", cache="off")
    return model, most(step(model, x)) / eager


@pytest.mark.parametrize("name", MODELS)
def test_a_first_call_has_no_more_than_a_step(name: str) -> None:
    model, share = shares(name)
    assert report(model).specialisations[0].verification.result == "bit-equal"
    assert share <= SHARE


@pytest.mark.parametrize("name", MODELS)
def test_comparing_by_value_takes_no_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where results are not bit-equal, both sets of them are needed, and lie in files."""
    compared: list[int] = []

    def looked(reference: Observed, actual: Observed) -> list[Difference]:
        compared.append(len(reference.values))
        return differences(reference, actual)

    monkeypatch.setattr(Trial, "marks", lambda *_: object())
    monkeypatch.setattr("graphopt.model.comparison.differences", looked)
    _, share = shares(name)
    assert compared
    assert share <= SHARE + 0.04  # a second set would be far more


def test_nothing_holds_what_a_first_call_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until garbage is looked for: a step's backward would have it beside its own."""
    monkeypatch.setattr(Trial, "marks", lambda *_: object())
    model = graphopt.optimize(Wide(), backend="eager", cache="off")
    gc.collect()
    gc.disable()
    try:
        returned = weakref.ref(model(torch.ones(2, 256)))
        assert returned() is None
    finally:
        gc.enable()
