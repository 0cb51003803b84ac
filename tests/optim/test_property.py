"""Training recipe on generated numbers and shapes."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.optim import (
    RunningMixup,
    Smoother,
    polynomial_decay,
    random_erasing,
    rescale_weights,
)

QUICK = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@QUICK
@given(
    start=st.floats(0, 100),
    length=st.floats(1e-3, 100),
    power=st.floats(0.1, 12),
    epochs=st.lists(st.floats(-10, 300), min_size=2, max_size=8),
)
def test_a_decay_never_rises_and_ends_at_zero(
    start: float, length: float, power: float, epochs: list[float]
) -> None:
    end = start + length
    found = [polynomial_decay(e, start=start, end=end, power=power) for e in sorted(epochs)]
    assert found == sorted(found, reverse=True)
    assert all(0 <= factor <= 1 for factor in found)
    assert polynomial_decay(start, start=start, end=end, power=power) == 1
    assert polynomial_decay(end, start=start, end=end, power=power) == 0
    middle = polynomial_decay(start + length / 2, start=start, end=end, power=power)
    assert math.isclose(middle, 0.5**power, rel_tol=1e-9 * (1 + power * end / length))


@QUICK
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    size=st.floats(1e-4, 1e4),
    seed=SEEDS,
)
def test_rescaling_keeps_the_direction_and_is_idempotent(
    shape: list[int], size: float, seed: int
) -> None:
    start = size * torch.randn(shape, dtype=torch.float64, generator=generator(seed))
    weight, shrunk = start.clone(), start.clone()
    rescale_weights([weight])
    target = math.sqrt(2 * shape[0])
    assert math.isclose(weight.norm().item(), target, rel_tol=1e-3)  # eps against 1e-4
    torch.testing.assert_close(weight / weight.norm(), start / start.norm())
    again = weight.clone()
    rescale_weights([again])
    torch.testing.assert_close(again, weight, rtol=1e-3, atol=0)
    rescale_weights([shrunk], only_shrink=True)
    assert torch.equal(shrunk, start if start.norm() + 1e-9 <= target else weight)


@QUICK
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    alpha=st.floats(1e-3, 10),
    seed=SEEDS,
)
def test_mixing_is_linear_convex_and_resumable(sizes: list[int], alpha: float, seed: int) -> None:
    """Labels that are a linear function of the inputs still are one afterwards."""
    one = RunningMixup(alpha, generator=generator(seed))
    data = generator(seed + 1)
    for size in sizes:
        other = RunningMixup(alpha, generator=generator(0))
        other.load_state_dict(one.state_dict())
        labels = torch.eye(3, dtype=torch.float64)[torch.randint(3, (size,), generator=data)]
        inputs = torch.stack([labels, 2 * labels], 1)
        mixed, soft = one(inputs, labels)
        assert mixed.shape == inputs.shape
        torch.testing.assert_close(mixed[:, 0], soft, rtol=0, atol=0)
        torch.testing.assert_close(mixed[:, 1], 2 * soft, rtol=0, atol=0)
        torch.testing.assert_close(soft.sum(1), torch.ones(size, dtype=torch.float64))
        assert (soft >= 0).all()
        assert ((soft * labels).sum(1) >= 0.5).all()
        repeated = other(inputs, labels)
        assert torch.equal(repeated[0], mixed)
        assert torch.equal(repeated[1], soft)


@QUICK
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (4, 3, 20, 20)]),
    least=st.floats(0, 1),
    more=st.floats(0, 1),
    aspect=st.floats(0.01, 1),
    seed=SEEDS,
)
def test_erasing_takes_one_rectangle_of_each_image(
    shape: tuple[int, int, int, int], least: float, more: float, aspect: float, seed: int
) -> None:
    images = torch.ones(shape)
    area = (least, least + (1 - least) * more)
    erased = random_erasing(images, rate=1.0, area=area, aspect=aspect, generator=generator(seed))
    gone = erased == 0
    assert torch.equal(gone.any(1), gone.all(1))  # all channels alike
    for image in gone[:, 0]:
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        assert len(rows) >= 1
        assert rows[-1] - rows[0] + 1 == len(rows)
        assert columns[-1] - columns[0] + 1 == len(columns)
        assert image.sum() == len(rows) * len(columns)
        # Never more than asked, but for rounding; less where the rectangle was cut to the image.
        most = area[1] * image.numel()
        assert (len(rows) - 0.5) * (len(columns) - 0.5) <= most * (1 + 1e-9) or image.sum() == 1


@QUICK
@given(
    std=st.sampled_from([0.0, 0.25, 1.0, 64.0]),
    pairs=st.sampled_from([1, 2, 4]),
    seed=SEEDS,
)
def test_smoothing_a_quadratic_changes_no_gradient(std: float, pairs: int, seed: int) -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    inputs = torch.randn(5, 4, dtype=torch.float64, generator=generator(seed))

    def loss() -> Tensor:
        return (model(inputs) - 1).square().mean()

    expected = torch.autograd.grad(loss(), list(model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    Smoother(model, std, pairs=pairs, generator=generator(seed)).backward(loss)
    for parameter, gradient, weight in zip(model.parameters(), expected, before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-10 * (1 + std))
        assert torch.equal(parameter, weight)
