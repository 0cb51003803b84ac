"""The smoother: quadratic oracle, exact restoration, averages, and resuming the whole recipe."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.optim import (
    PolynomialDecay,
    RunningMixup,
    Smoother,
    random_erasing,
    rescale_weights,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic(nn.Module):
    """L = w' H w / 2 + b' w, of a weight in two parameters of 3 and 2 elements."""

    def __init__(self) -> None:
        super().__init__()
        root = torch.randn(5, 5, dtype=torch.float64, generator=generator(1))
        self.hessian = root @ root.T
        self.linear = torch.randn(5, dtype=torch.float64, generator=generator(2))
        self.a = nn.Parameter(torch.randn(3, 1, dtype=torch.float64, generator=generator(3)))
        self.b = nn.Parameter(torch.randn(2, dtype=torch.float64, generator=generator(4)))

    def weight(self) -> Tensor:
        return torch.cat([self.a.flatten(), self.b])

    def forward(self) -> Tensor:
        w = self.weight()
        return w @ self.hessian @ w / 2 + self.linear @ w

    def gradient(self) -> Tensor:
        return (self.hessian @ self.weight() + self.linear).detach()

    def found(self) -> Tensor:
        assert self.a.grad is not None
        assert self.b.grad is not None
        return torch.cat([self.a.grad.flatten(), self.b.grad])


DEVIATIONS = {
    "a": torch.tensor([[0.1], [0.5], [2.0]], dtype=torch.float64),
    "b": torch.tensor(0.7, dtype=torch.float64),
}
SIGMA = torch.tensor([0.1, 0.5, 2.0, 0.7, 0.7], dtype=torch.float64) ** 2


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("std", [1.5, DEVIATIONS, lambda name, p: DEVIATIONS[name]])
def test_on_a_quadratic_the_gradient_is_the_plain_one(std: Any, pairs: int) -> None:
    model = Quadratic()
    Smoother(model, std, pairs=pairs, generator=generator()).backward(model)
    torch.testing.assert_close(model.found(), model.gradient(), rtol=1e-12, atol=1e-12)


def test_each_pair_raises_a_quadratic_loss_by_half_of_its_own_form() -> None:
    model = Quadratic()
    loss = Smoother(model, DEVIATIONS, pairs=4, generator=generator(9)).backward(model)
    same = Smoother(model, DEVIATIONS, generator=generator(9))
    excess = 0.0
    for _ in range(4):
        noise = same.draw()
        vector = torch.cat([noise["a"].flatten(), noise["b"]])
        excess += (vector @ model.hessian @ vector / 8).item()
    assert loss.item() - model().item() == pytest.approx(excess, rel=1e-10)


def test_the_mean_excess_is_half_the_trace_of_h_sigma() -> None:
    model = Quadratic()
    pairs = 3000
    loss = Smoother(model, DEVIATIONS, pairs=pairs, generator=generator()).backward(model)
    scaled = model.hessian * SIGMA.sqrt() * SIGMA.sqrt()[:, None]
    expected = scaled.trace().item() / 2
    # The variance of a normal quadratic form x'Hx is 2 tr((H Sigma)^2).
    deviation = math.sqrt(2 * (scaled @ scaled).trace().item()) / 2 / math.sqrt(pairs)
    assert deviation < expected / 20
    assert abs(loss.item() - model().item() - expected) < 4 * deviation


def test_on_a_quartic_the_gradient_is_that_of_the_smoothed_loss() -> None:
    """E (w + eps)^4 = w^4 + 6 w^2 s^2 + 3 s^4, whose gradient is 4 w^3 + 12 w s^2."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    Smoother(model, 0.3, pairs=4000, generator=generator()).backward(
        lambda: (model.weight**4).sum()
    )
    assert model.weight.grad is not None
    plain, smoothed = 4 * 0.5**3, 4 * 0.5**3 + 12 * 0.5 * 0.3**2
    assert model.weight.grad.item() == pytest.approx(smoothed, rel=0.05)
    assert abs(smoothed - plain) > 0.3 * smoothed


def test_earlier_gradients_are_added_to_and_not_averaged() -> None:
    model = Quadratic()
    model.a.grad = torch.full_like(model.a, 10.0)
    held = model.a.grad
    Smoother(model, 0.5, pairs=2, generator=generator()).backward(model)
    assert model.a.grad is held
    expected = model.gradient()
    expected[:3] += 10
    torch.testing.assert_close(model.found(), expected, rtol=1e-12, atol=1e-12)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    before, seen = weights(model), []
    data = torch.ones(2, 6, dtype=dtype)

    def closure() -> Tensor:
        seen.append(weights(model))
        return model(data).sum()

    Smoother(model, 0.37, pairs=2, generator=generator()).backward(closure)
    assert_equal(weights(model), before)
    assert len(seen) == 4
    for plus, minus in ((seen[0], seen[1]), (seen[2], seen[3])):
        for one, other, middle in zip(plus, minus, before, strict=True):
            assert not torch.equal(one, other)
            torch.testing.assert_close((one + other) / 2, middle, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_weights_and_gradients_survive_an_exception(call: int) -> None:
    model = network()
    model(torch.ones(2, 6)).sum().backward()
    before = weights(model)
    held = [p.grad for p in model.parameters()]
    copies = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return model(torch.ones(2, 6)).sum()

    with pytest.raises(KeyboardInterrupt):
        Smoother(model, 0.37, pairs=2, generator=generator()).backward(closure)
    assert calls == call
    assert_equal(weights(model), before)
    for parameter, gradient, copy in zip(model.parameters(), held, copies, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(parameter.grad, copy)


def test_frozen_parameters_are_not_touched_nor_drawn_for() -> None:
    model = network()
    model[0].requires_grad_(False)
    names = {"2.weight": torch.tensor(0.1), "2.bias": torch.tensor(0.0)}
    smoother = Smoother(model, names, generator=generator())
    noise = smoother.draw()
    assert set(noise) == {"2.weight", "2.bias"}
    assert not noise["2.bias"].any()
    frozen = model[0].weight.clone()
    with smoother.perturbed(noise):
        assert torch.equal(model[0].weight, frozen)
        assert not torch.equal(model[2].weight, weights(network())[2])


def test_averages_are_equal_and_weights_return() -> None:
    model = network()
    smoother = Smoother(model, 0.0)
    taken = []
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step + 1)
        smoother.update_average()
        taken.append(weights(model))
    means = [torch.stack(list(group)).mean(0) for group in zip(*taken, strict=True)]
    before = weights(model)
    with smoother.averaged():
        for found, expected in zip(weights(model), means, strict=True):
            torch.testing.assert_close(found, expected)
    assert_equal(weights(model), before)
    with pytest.raises(RuntimeError, match="evaluation"), smoother.averaged():
        raise RuntimeError("evaluation")
    assert_equal(weights(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": -0.1}, "negative or not finite"),
        ({"std": math.nan}, "negative or not finite"),
        ({"std": {"a": torch.tensor(-1.0), "b": torch.tensor(1.0)}}, "negative or not finite"),
        ({"std": {"a": torch.tensor(1.0)}}, "no deviation for parameter 'b'"),
        ({"std": 0.1, "pairs": 0}, "pairs=0 is not positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Smoother(Quadratic(), **options)


def test_a_deviation_of_another_shape_is_refused() -> None:
    model = Quadratic()
    smoother = Smoother(model, lambda name, p: torch.ones(4, 1) if name == "a" else 1.0)
    before = weights(model)
    with pytest.raises(ArgumentError, match=r"deviation of 'a', \(4, 1\), does not broadcast"):
        smoother.backward(model)
    assert_equal(weights(model), before)


@pytest.mark.parametrize("wrong", [1.0, torch.tensor(1.0), torch.ones(2, requires_grad=True)])
def test_a_closure_without_a_loss_is_refused(wrong: Any) -> None:
    model = Quadratic()
    with pytest.raises(ArgumentError, match="returned no loss"):
        Smoother(model, 0.1).backward(lambda: wrong)


def test_averages_of_another_model_are_refused() -> None:
    smoother = Smoother(network(), 0.1)
    message = r"no average of parameter '0\.weight'"
    with pytest.raises(ArgumentError, match=message), smoother.averaged():
        pass
    smoother.update_average()
    with pytest.raises(StateError, match=r"saved average of '0\.weight'"):
        Smoother(nn.Sequential(nn.Linear(6, 7)), 0.1).load_state_dict(smoother.state_dict())
    with pytest.raises(StateError, match="generator of their own"):
        Smoother(network(), 0.1, generator=generator()).load_state_dict(smoother.state_dict())


class Recipe:
    """A small training with everything in it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        self.random = generator(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.scheduler = PolynomialDecay(
            self.optimizer, start=1, end=6, power=2, steps_per_epoch=2, buffer="gradients"
        )
        # One generator for all three: loading its state three times does no harm.
        self.mixup = RunningMixup(0.4, generator=self.random)
        self.smoother = Smoother(self.model, 0.01, pairs=2, generator=self.random)

    def parts(self) -> list[Any]:
        return [self.model, self.optimizer, self.scheduler, self.mixup, self.smoother]

    def step(self, t: int) -> None:
        size = 3 if t % 3 == 2 else 5  # every third batch is a short one
        images = torch.randn(size, 1, 6, 6, generator=generator(100 + t))
        labels = torch.eye(3)[torch.arange(size) % 3]
        images, labels = self.mixup(images, labels)
        images = random_erasing(images, generator=self.random)
        self.optimizer.zero_grad()
        self.smoother.backward(lambda: nn.functional.cross_entropy(self.model(images), labels))
        self.optimizer.step()
        rescale_weights(self.model.parameters(), only_shrink=True)
        self.scheduler.step()
        self.smoother.update_average()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit() -> None:
    whole, first, second = Recipe(0), Recipe(0), Recipe(1)
    for t in range(9):
        whole.step(t)
    for t in range(5):
        first.step(t)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts()], file)
    file.seek(0)
    for part, state in zip(second.parts(), torch.load(file), strict=True):
        part.load_state_dict(state)
    for t in range(5, 9):
        second.step(t)
    assert_equal(weights(second.model), weights(whole.model))
    with whole.smoother.averaged(), second.smoother.averaged():
        assert_equal(weights(second.model), weights(whole.model))
    assert not torch.equal(weights(first.model)[0], weights(whole.model)[0])
