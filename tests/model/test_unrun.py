"""Models that train while nobody calls what was optimized: this is said, once, with what to try."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from graphopt.errors import ArgumentError
from graphopt.model.surface import report, restore


class Whole(nn.Module):
    """Has a forward; a trainer may call its part instead."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.net = nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.net(x))


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
SAID = (
    "Whole gets gradients, and its optimized forward was never called: parts or other methods of "
    "it are, and run as plain PyTorch"
)


def test_a_trainer_that_calls_a_part() -> None:
    model = graphopt.optimize(Whole(), backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.net(X).sum().backward()
    (one,) = caught
    hint = "Optimize what is called (graphopt.optimize(model.net)), or call the model itself."
    assert str(one.message) == f"{SAID}. {hint}"
    assert one.filename == __file__
    assert SAID in report(model).notes


@pytest.mark.parametrize("example", [None, (X,)])
def test_nothing_is_said_of_a_model_that_is_called(example: object) -> None:
    model = graphopt.optimize(Whole(), example, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X).sum().backward()
        model.net(X).sum().backward()
        counted = graphopt.optimize(Whole(), backend="eager")
        with FlopCounterMode(display=False):
            counted(X).sum().backward()
        twin = copy.deepcopy(model)
        twin(X).sum().backward()
    assert not report(model).notes
    assert not model.net.weight._post_accumulate_grad_hooks


def test_a_model_given_back_is_not_waited_for() -> None:
    model = graphopt.optimize(Whole(), backend="eager")
    restore(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X).sum().backward()


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.generator = nn.ReLU(), nn.Linear(4, 4)


def test_a_model_without_forward_is_refused() -> None:
    with pytest.raises(ArgumentError) as caught:
        graphopt.optimize(Parts())
    assert caught.value.message == "Parts has no forward, so there is nothing to optimize"
    assert caught.value.hint == "optimize the networks in it: graphopt.optimize(model.generator)"
