"""Constant delay against weights that are written down update by update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.optim import DelayedSGD
from graphopt.study import ConstantDelay


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def closures(model: nn.Module, steps: int) -> list[Callable[[], Tensor]]:
    random = torch.Generator().manual_seed(1)
    data = [torch.randn(5, 3, generator=random) for _ in range(steps)]
    return [lambda x=x: model(x).square().mean() for x in data]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_without_delay_it_is_ordinary_training_bit_for_bit() -> None:
    ours, theirs = network(), network()
    training = ConstantDelay(DelayedSGD(ours.parameters(), lr=0.1), 0)
    losses = [training.step(closure) for closure in closures(ours, 6)]
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for loss, closure in zip(losses, closures(theirs, 6), strict=True):
        optimizer.zero_grad()
        expected = closure()
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected.detach())
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


@pytest.mark.parametrize("drain", [False, True])
@pytest.mark.parametrize("delay", [1, 3, 200])
def test_gradients_come_from_the_weights_of_their_step(delay: int, drain: bool) -> None:
    """With the weights of all steps kept: w_{t+1} = w_t - lr * gradient at w_{t-D}."""
    steps = delay + 4
    model = network()
    training = ConstantDelay(torch.optim.SGD(model.parameters(), lr=0.1), delay)
    for closure in closures(model, steps):
        training.step(closure)
    if drain:
        training.drain()
    other = network()
    names = [name for name, _ in other.named_parameters()]
    history = [weights(other)]
    gradients = []
    for closure in closures(other, steps):
        with torch.no_grad():
            for name, value in zip(names, history[-1], strict=True):
                other.get_parameter(name).copy_(value)
        gradients.append(torch.autograd.grad(closure(), list(other.parameters())))
        history.append(history[-1])
        if len(gradients) > delay:
            due = gradients[len(gradients) - 1 - delay]
            history[-1] = [w - 0.1 * g for w, g in zip(history[-1], due, strict=True)]
    if drain:
        for due in gradients[steps - delay :]:
            history.append([w - 0.1 * g for w, g in zip(history[-1], due, strict=True)])
    for found, expected in zip(weights(model), history[-1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["velocity", "weight", "geometric"])
def test_gradients_are_those_of_the_prediction(form: Any) -> None:
    """On w^2 / 2 the gradient is the weight that the forward and backward saw."""
    weight = nn.Parameter(torch.tensor(1.0))
    optimizer = DelayedSGD([weight], lr=0.1, delay=2, prediction=form)
    training = ConstantDelay(optimizer, 2)
    expected = []
    for _ in range(6):
        expected.append(optimizer.predict()[weight].item())
        training.step(lambda: weight**2 / 2)
        if len(expected) > 2:
            assert weight.grad is not None
            assert weight.grad.item() == expected[-3]
    assert len(set(expected)) > 3


def test_bad_delays_are_refused() -> None:
    model = network()
    with pytest.raises(ArgumentError, match="delay=-1 is negative"):
        ConstantDelay(torch.optim.SGD(model.parameters()), -1)
    with pytest.raises(ArgumentError, match="expects a delay of 3 where it is 4"):
        ConstantDelay(DelayedSGD(model.parameters(), delay=3), 4)


def test_a_resumed_training_goes_on_bit_for_bit() -> None:
    models = [network(), network()]
    trainings = [ConstantDelay(torch.optim.Adam(m.parameters(), lr=0.1), 2) for m in models]
    for number in range(8):
        if number == 3:
            state = trainings[1].state_dict()
            trainings[1] = ConstantDelay(torch.optim.Adam(models[1].parameters(), lr=0.1), 2)
            trainings[1].load_state_dict(state)
        for model, training in zip(models, trainings, strict=True):
            training.step(closures(model, 8)[number])
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, models), strict=True))


def test_the_state_of_another_training_is_refused() -> None:
    model = network()
    training = ConstantDelay(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    for closure in closures(model, 2):
        training.step(closure)
    state = training.state_dict()
    with pytest.raises(StateError, match="delay of 1"):
        ConstantDelay(torch.optim.SGD(network().parameters(), lr=0.1), 1).load_state_dict(state)
    other = torch.optim.SGD(nn.Linear(3, 4).parameters(), lr=0.1)
    with pytest.raises(StateError, match="2 parameters"):
        ConstantDelay(other, 2).load_state_dict(state)
