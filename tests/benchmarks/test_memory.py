"""The tool that counts bytes of steps, and what it must find: no more than eager holds."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import graphopt
from benchmarks.memory import Held, of_step, tally
from benchmarks.zoo import Step
from graphopt.testing.corpus import CORPUS


def test_a_known_run() -> None:
    def run() -> Tensor:
        a = torch.empty(1024)
        b = a + 1
        del a
        c = torch.empty(4096)
        del b
        return c

    assert tally(run) == Held(peak=4 * (1024 + 4096), left=4 * 4096)
    assert tally(lambda: None) == Held(0, 0)


def test_saved_values_and_gradients_of_a_known_step() -> None:
    layer = nn.Linear(64, 32, bias=False)
    x = torch.randn(16, 64)
    made = Step(nn.Sequential(layer, nn.ReLU()), (x,), {}, lambda out: out.sum())
    found = of_step(made)
    # What ReLU returns is kept, and the loss; then the gradients on the way and of the weight.
    assert found["saved"] == 4 * (16 * 32 + 1)
    assert 4 * (16 * 32 + 64 * 32) <= found["peak"] <= 4 * (3 * 16 * 32 + 64 * 32 + 64)


def _made(name: str) -> Step:
    entry = CORPUS[name]
    return Step(*entry.make(), entry.loss)


@pytest.mark.corpus
@pytest.mark.parametrize(
    "name",
    [
        # A recurrent layer is one operator here and keeps what all of its steps need.
        *("resnet", "unet", "mobilenet", "vit", "transformer_encoder"),
        *("checkpointed", "in_place", "gpt2"),
    ],
)
def test_a_step_saves_no_more_than_eager(name: str) -> None:
    plain = _made(name)
    model = graphopt.optimize(copy.deepcopy(plain.model), backend="eager", verify="off")
    eager, ours = of_step(plain), of_step(replace(plain, model=model))
    assert ours["saved"] <= eager["saved"]
    assert ours["peak"] <= 1.02 * eager["peak"]


def test_the_first_call_needs_no_more_than_a_step() -> None:
    """Its comparison with eager runs two steps, whose results are never there at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
    plain = Step(model, (torch.randn(32, 256),), {}, lambda out: out.square().mean())
    ours = replace(plain, model=graphopt.optimize(copy.deepcopy(model), backend="eager"))
    first, step = tally(ours).peak, of_step(plain)["peak"]
    assert first <= 1.1 * step
