"""Weight rescaling, running mixup and random erasing against their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.optim import RunningMixup, random_erasing, rescale_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- weight rescaling


def test_rescaled_weights_have_the_norm_of_the_formula() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(5, 18)).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rescale_weights(model.parameters())
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, before[name])
            continue
        target = math.sqrt(2 * parameter.shape[0])  # 4 and 6
        assert parameter.norm().item() == pytest.approx(target, rel=1e-8)
        expected = before[name] * target / (before[name].norm() + 1e-9)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=0)
    assert math.sqrt(2 * 8) == 4


def test_only_shrinking_leaves_small_weights_bit_for_bit() -> None:
    small, large = torch.full((8, 4), 0.1), torch.full((8, 4), 100.0)
    kept = small.clone()
    rescale_weights([small, large], only_shrink=True)
    assert torch.equal(small, kept)
    assert large.norm().item() == pytest.approx(4.0, rel=1e-6)
    rescale_weights(small)
    assert small.norm().item() == pytest.approx(4.0, rel=1e-6)


def test_a_zero_weight_stays_zero() -> None:
    zero = torch.zeros(2, 3)
    rescale_weights(zero)
    assert torch.equal(zero, torch.zeros(2, 3))


def test_low_precision_weights_are_scaled_in_float32() -> None:
    large = torch.full((2, 64), 6e4, dtype=torch.float16)  # a norm beyond 65504
    rescale_weights(large)
    assert large.float().norm().item() == pytest.approx(2.0, rel=1e-3)
    for seed in range(8):  # a bfloat16 scale would be off by up to 0.4 %
        weight = torch.randn(64, 256, generator=generator(seed)).bfloat16()
        rescale_weights(weight)
        assert weight.float().norm().item() == pytest.approx(math.sqrt(128), rel=5e-4)


def test_rescaling_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ArgumentError, match=r"eps=-1\.0 is negative"):
        rescale_weights([], eps=-1.0)
    with pytest.raises(ArgumentError, match=r"torch\.int64 cannot be rescaled"):
        rescale_weights(torch.ones(2, 2, dtype=torch.int64))


# --- running mixup


def batches(count: int, size: int = 6) -> list[Tensor]:
    """Batch t is the unit vector t: what comes out are the shares of all batches so far."""
    return [torch.eye(count, dtype=torch.float64)[t].repeat(size, 1) for t in range(count)]


@pytest.mark.parametrize("own_majority", [True, False])
def test_shares_follow_the_recursion(own_majority: bool) -> None:
    mixup = RunningMixup(0.7, own_majority=own_majority, generator=generator())
    before = None
    for t, batch in enumerate(batches(5)):
        shares, labels = mixup(batch, 2 * batch)
        torch.testing.assert_close(labels, 2 * shares, rtol=1e-15, atol=0)
        torch.testing.assert_close(shares.sum(1), torch.ones(6).double(), rtol=1e-14, atol=0)
        if before is None:
            assert torch.equal(shares, batch)
        else:
            own = shares[:, t : t + 1]
            torch.testing.assert_close(shares, own * batch + (1 - own) * before)
            assert len(own.unique()) == 6  # one lam per sample
            assert ((own >= 0.5) | (not own_majority)).all()
        before = shares


@pytest.mark.parametrize("alpha", [0.05, 0.4, 1.0, 6.0])
def test_lam_is_beta_distributed(alpha: float) -> None:
    count = 20000
    mixup = RunningMixup(alpha, own_majority=False, generator=generator(3))
    mixup(torch.zeros(count, 1, dtype=torch.float64), torch.zeros(count, 1))
    lam = mixup(torch.ones(count, 1, dtype=torch.float64), torch.zeros(count, 1))[0].flatten()
    reference = np.sort(np.random.default_rng(0).beta(alpha, alpha, 20 * count))
    found = np.sort(lam.numpy())
    # Both distribution functions at every value found: near 1, values of small alpha are ties.
    shares = np.searchsorted(found, found, side="right") / len(found)
    expected = np.searchsorted(reference, found, side="right") / len(reference)
    distance = np.abs(shares - expected).max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov, 0.1 %


def test_the_smallest_alpha_gives_zeros_and_ones() -> None:
    count = 4000
    mixup = RunningMixup(1e-4, own_majority=False, generator=generator())
    mixup(torch.zeros(count, 1), torch.zeros(count, 1))
    lam = mixup(torch.ones(count, 1), torch.zeros(count, 1))[0]
    assert lam.isfinite().all()
    assert ((lam < 1e-3) | (lam > 1 - 1e-3)).float().mean() > 0.99
    assert abs(lam.mean() - 0.5) < 0.05


def test_a_short_batch_leaves_the_other_virtual_samples() -> None:
    mixup = RunningMixup(1.0, generator=generator())
    first, second, third, fourth = batches(4)
    shares_one, _ = mixup(first, first)
    shares_two, _ = mixup(second[:2], second[:2])
    assert shares_two.shape == (2, 4)
    shares_three, _ = mixup(third, third)
    assert (shares_three[:2, 1] > 0).all()  # mixed with the short batch
    assert (shares_three[2:, 1] == 0).all()  # mixed with the batch before it
    assert (shares_three[2:, 0] > 0).all()
    longer = torch.cat([fourth, fourth[:3]])
    shares_four, _ = mixup(longer, longer)
    assert torch.equal(shares_four[6:], longer[6:])  # no partner yet
    assert (shares_four[:6, 2] > 0).all()
    assert torch.equal(shares_one, first)


def test_the_callers_tensors_are_not_shared() -> None:
    def run(erase: bool) -> Tensor:
        mixup = RunningMixup(1.0, generator=generator())
        for batch in batches(3):
            given = batch.clone()
            mixed, _ = mixup(given, given)
            assert torch.equal(given, batch)
            kept = mixed.clone()
            if erase:
                mixed.zero_()
                given.zero_()
        return kept

    assert torch.equal(run(True), run(False))


def test_gradients_reach_the_present_inputs_only() -> None:
    mixup = RunningMixup(1.0, generator=generator())
    earlier = torch.ones(2, 3, requires_grad=True)
    mixup(earlier, torch.ones(2, 1))
    inputs = torch.ones(2, 3, requires_grad=True)
    mixed, _ = mixup(inputs, torch.ones(2, 1))
    mixed.sum().backward()
    assert inputs.grad is not None
    assert ((inputs.grad >= 0.5) & (inputs.grad <= 1)).all()
    assert earlier.grad is None


def test_wrong_batches_are_refused() -> None:
    mixup = RunningMixup(0.4)
    images, labels = torch.ones(4, 3), torch.ones(4, 2)
    cases: list[tuple[Tensor, Tensor, str]] = [
        (images[:0], labels[:0], "the batch is empty"),
        (images, labels[:3], "differ in length"),
        (images, torch.tensor(1.0), "differ in length"),
        (images, torch.ones(4, dtype=torch.int64), r"one_hot"),
        (images.byte(), labels, "inputs of torch.uint8 cannot be mixed"),
    ]
    for inputs, targets, message in cases:
        with pytest.raises(ArgumentError, match=message):
            mixup(inputs, targets)
    mixup(images, labels)
    with pytest.raises(ArgumentError, match=r"inputs of shape \(5,\) per sample follow"):
        mixup(torch.ones(4, 5), labels)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ArgumentError, match="is not a positive number"):
        RunningMixup(alpha)


def test_a_state_needs_a_generator_on_both_sides() -> None:
    with pytest.raises(StateError, match="generator of their own"):
        RunningMixup(0.4).load_state_dict(RunningMixup(0.4, generator=generator()).state_dict())


# --- random erasing


def rectangles(images: Tensor, erased: Tensor) -> list[tuple[int, int]]:
    """Height and width of what was erased of each image, (0, 0) for nothing."""
    sizes = []
    for image, result in zip(images, erased, strict=True):
        gone = (result == 0).all(0)
        assert torch.equal(gone, (result == 0).any(0))
        assert torch.equal(result[:, ~gone], image[:, ~gone])
        rows, columns = gone.any(1).nonzero().flatten(), gone.any(0).nonzero().flatten()
        assert gone.sum() == len(rows) * len(columns)
        for lines in (rows, columns):
            assert len(lines) == 0 or lines[-1] - lines[0] == len(lines) - 1
        sizes.append((len(rows), len(columns)))
    return sizes


def test_erased_rectangles_have_the_asked_sizes() -> None:
    images = torch.rand(1500, 2, 64, 64, generator=generator()) + 1
    kept = images.clone()
    sizes = rectangles(images, random_erasing(images, generator=generator(1)))
    assert torch.equal(images, kept)
    hit = np.array([size for size in sizes if size != (0, 0)])
    assert abs(len(hit) / 1500 - 0.5) < 4 * 0.5 / math.sqrt(1500)
    height, width = hit.T.astype(float)
    # Half a pixel of rounding on either side.
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * 64**2).all()
    assert ((height - 0.5) * (width - 0.5) <= 0.25 * 64**2).all()
    ratio = (np.minimum(height, width) + 0.5) / (np.maximum(height, width) - 0.5)
    assert (ratio >= 0.3).all()
    assert 0.4 < (height > width).mean() < 0.6
    parts = height * width / 64**2
    assert abs(parts.mean() - 0.135) < 0.015  # uniform between .02 and .25
    assert parts.min() < 0.03
    assert parts.max() > 0.24


def test_every_pixel_can_be_erased() -> None:
    images = torch.ones(3000, 1, 5, 7)
    erased = random_erasing(images, rate=1.0, area=(0.0, 0.01), aspect=1.0, generator=generator())
    share = (erased == 0).float().mean(0)[0]
    assert ((erased == 0).sum((1, 2, 3)) == 1).all()  # one pixel, nowhere more often than elsewhere
    assert (share - 1 / 35).abs().max() < 5 * math.sqrt(1 / 35 / 3000)


def test_erasing_keeps_dtype_and_repeats_with_its_generator() -> None:
    images = torch.full((8, 3, 9, 4), 7, dtype=torch.uint8)
    one = random_erasing(images, generator=generator(5))
    assert one.dtype is torch.uint8
    assert torch.equal(one, random_erasing(images, generator=generator(5)))
    assert not torch.equal(one, random_erasing(images, generator=generator(6)))
    assert torch.equal(random_erasing(images, rate=0.0), images)
    square = images[..., :4, :]
    assert not random_erasing(square, rate=1.0, area=(1.0, 1.0), aspect=1.0).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 1.5},
        {"rate": math.nan},
        {"area": (0.3, 0.2)},
        {"area": (-0.1, 0.2)},
        {"area": (0.1, 1.2)},
        {"aspect": 0.0},
        {"aspect": 1.5},
    ],
)
def test_erasing_refuses_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="out of range"):
        random_erasing(torch.ones(2, 1, 4, 4), **wrong)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 4, 4), (2, 3, 0, 4)])
def test_erasing_refuses_what_is_no_batch_of_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="are no batch"):
        random_erasing(torch.ones(shape))
