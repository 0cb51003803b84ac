"""RMSprop that turns into SGD, against its formula in scalars and against PyTorch's optimizers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from graphopt.errors import ArgumentError
from graphopt.optim import RMSpropWarmup, sgd_share

SHAPES = ((3, 4), (5,), (2, 1, 3))
DONE: dict[str, float] = {"center": 0.0, "period": 1e-9}  # over before the second step


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=random).to(dtype)) for s in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=random).to(dtype) for s in SHAPES]


def give(params: list[nn.Parameter], step: int) -> None:
    for p, g in zip(params, gradients(step, params[0].dtype), strict=True):
        p.grad = g


def warmup(params: Any, lr: float = 0.1, **options: Any) -> RMSpropWarmup:
    return RMSpropWarmup(params, lr, **{"steps_per_epoch": 4, **options})


# -- the transition --------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "period"), [(10.0, 5.0), (3.0, 2.0), (0.5, 8.0)])
def test_the_transition_is_the_closed_form(center: float, period: float) -> None:
    for i in range(200):
        epoch = i * 0.1
        if epoch < center:
            expected = math.exp(2 * (epoch - center) / period) / 2
        elif epoch < center + period / 2:
            expected = 1 / 2 + (epoch - center) / period
        else:
            expected = 1.0
        assert sgd_share(epoch, center=center, period=period) == pytest.approx(expected, rel=1e-13)


def test_both_ends_of_the_straight_part_are_continuous_and_its_slope_fits() -> None:
    h = 1e-6
    start, end = 10.0, 12.5
    for place, value in ((start, 0.5), (end, 1.0)):
        for side in (-h, 0.0, h):
            assert sgd_share(place + side) == pytest.approx(value, abs=2 * h)
    left = (sgd_share(start) - sgd_share(start - h)) / h
    right = (sgd_share(start + h) - sgd_share(start)) / h
    assert left == pytest.approx(1 / 5, rel=1e-5)
    assert right == pytest.approx(1 / 5, rel=1e-5)
    assert (sgd_share(end) - sgd_share(end - h)) / h == pytest.approx(1 / 5, rel=1e-5)
    assert sgd_share(end) == sgd_share(1e9) == 1.0
    values = [sgd_share(i / 100) for i in range(1500)]
    assert values == sorted(values)
    assert max(values) == 1.0  # the form with twice the slope would reach 3/2


@pytest.mark.parametrize(
    ("epoch", "options"),
    [
        (-1.0, {}),
        (math.nan, {}),
        (1.0, {"center": -1.0}),
        (1.0, {"center": math.inf}),
        (1.0, {"period": 0.0}),
        (1.0, {"period": math.nan}),
    ],
)
def test_bad_transitions(epoch: float, options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError) as caught:
        sgd_share(epoch, **options)
    assert caught.value.hint


# -- steps -----------------------------------------------------------------------------------------


def _by_the_formula(steps: int, rates: list[float]) -> list[list[float]]:
    """Element by element, in Python's floats; eta multiplies Delta, which is kept without it."""
    mu1, mu2, eps, rms, center, period, decay = 0.8, 0.95, 1e-3, 0.02, 1.0, 1.5, 0.01
    found = []
    flat = [p.detach().flatten().tolist() for p in parameters()]
    for index, theta in enumerate(flat):
        m, delta = [0.0] * len(theta), [0.0] * len(theta)
        for step in range(steps):
            eta, epoch = rates[step], step / 4
            a = min(0.5 + (epoch - center) / period, 1.0)
            if epoch < center:
                a = 0.5 * math.exp(2 * (epoch - center) / period)
            for i, g in enumerate(gradients(step)[index].flatten().tolist()):
                g += decay * theta[i]
                m[i] = mu2 * m[i] + (1 - mu2) * g * g
                factor = a + (1 - a) * rms / eta / (math.sqrt(m[i]) + eps)
                delta[i] = mu1 * delta[i] - factor * g
                theta[i] += eta * delta[i]
        found.append(theta)
    return found


@pytest.mark.parametrize("steps", [1, 3, 6, 9])  # RMSprop, then both, then SGD from step 7 on
def test_steps_are_those_of_the_formula(steps: int) -> None:
    params, rates = parameters(), [0.1 / (1 + step % 3) for step in range(10)]
    options = {"rms_lr": 0.02, "momentum": 0.8, "decay": 0.95, "eps": 1e-3, "weight_decay": 0.01}
    optimizer = warmup(params, center=1.0, period=1.5, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        give(params, step)
        optimizer.step()
    for p, expected in zip(params, _by_the_formula(steps, rates), strict=True):
        torch.testing.assert_close(
            p.detach().flatten(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-12,
            atol=1e-14,
        )


def test_long_before_the_transition_it_is_rmsprop_of_pytorch() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = warmup(ours, 7.0, center=1e4, rms_lr=0.02)
    peer = torch.optim.RMSprop(theirs, 0.02, alpha=0.99, eps=1e-8, momentum=0.9)
    for step in range(5):
        give(ours, step)
        give(theirs, step)
        optimizer.step()
        peer.step()
    assert optimizer.share == 0.0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_after_the_transition_it_is_sgd_to_the_last_bit(dtype: torch.dtype, decay: float) -> None:
    ours = parameters(dtype)
    optimizer = warmup(ours, center=0.5, period=1.0, weight_decay=decay)
    for step in range(4):
        give(ours, step)
        optimizer.step()
    assert optimizer.share == 1.0
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    # Loops of PyTorch round bfloat16 differently in its operators for one and for many tensors.
    peer = torch.optim.SGD(theirs, 0.1, momentum=0.9, weight_decay=decay, foreach=True)
    for a, b in zip(ours, theirs, strict=True):
        peer.state[b]["momentum_buffer"] = optimizer.state[a]["momentum_buffer"].clone()
    schedules = [LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, peer)]
    for step in range(4, 10):
        give(ours, step)
        give(theirs, step)
        for o, schedule in zip((optimizer, peer), schedules, strict=True):
            o.step()
            schedule.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all("square_average" not in optimizer.state[p] for p in ours)


def test_a_learning_rate_of_zero_lets_parameters_rest() -> None:
    params = parameters()
    optimizer = warmup(params, 0.0)
    give(params, 0)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    give(params, 1)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], parameters()[0])


def test_parameters_without_gradients_are_left_alone() -> None:
    params = parameters()
    optimizer = warmup(params, **DONE)
    give(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], parameters()[1])
    assert not optimizer.state[params[1]]
    for p in params:
        p.grad = None
    optimizer.step()
    assert optimizer.param_groups[0]["steps"] == 2


def test_groups_have_settings_of_their_own_and_one_clock() -> None:
    params, alone = parameters(), parameters()
    optimizer = warmup(params[:1], center=1.0, period=1.0)
    give(params, 0)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:2], "lr": 0.5, "momentum": 0.5})
    assert [g["steps"] for g in optimizer.param_groups] == [1, 1]
    give(params, 1)
    optimizer.step()
    other = warmup(alone[1:2], 0.5, momentum=0.5, center=1.0, period=1.0)
    other.param_groups[0]["steps"] = 1
    give(alone, 1)
    other.step()
    assert torch.equal(params[1], alone[1])


def test_a_closure_makes_the_gradients() -> None:
    params = parameters()
    optimizer = warmup(params)

    def closure() -> float:
        assert torch.is_grad_enabled()
        give(params, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert not torch.equal(params[0], parameters()[0])


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 6])  # in RMSprop, in the transition, in SGD
def test_a_resumed_training_has_the_same_bits(at: int) -> None:
    def trained(resume: bool) -> tuple[list[nn.Parameter], dict[str, Any]]:
        params = parameters(torch.float32)
        optimizer = warmup(params, center=0.5, period=1.5)
        for step in range(9):
            if resume and step == at:
                saved = copy.deepcopy(optimizer.state_dict())
                params = [nn.Parameter(p.detach().clone()) for p in params]
                optimizer = warmup(params, center=9.0, period=9.0)  # the state brings its own
                optimizer.load_state_dict(saved)
            give(params, step)
            optimizer.step()
        return params, optimizer.state_dict()

    (straight, state), (resumed, other) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert state["param_groups"] == other["param_groups"]
    for index, own in state["state"].items():
        assert own.keys() == other["state"][index].keys()
        assert all(torch.equal(own[name], other["state"][index][name]) for name in own)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -0.1},
        {"lr": math.nan},
        {"rms_lr": -1.0},
        {"rms_lr": math.inf},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"decay": 1.0},
        {"eps": 0.0},
        {"steps_per_epoch": 0},
        {"steps_per_epoch": math.inf},
        {"center": -1.0},
        {"period": 0.0},
        {"weight_decay": -1e-4},
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ArgumentError, match=name) as caught:
        warmup(parameters(), **options)
    assert caught.value.hint
    assert caught.value.where == "parameter group 0"


def test_bad_settings_of_a_group_change_nothing() -> None:
    params = parameters()
    optimizer = warmup(params[:1])
    with pytest.raises(ArgumentError, match="momentum"):
        optimizer.add_param_group({"params": params[1:], "momentum": 2.0})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ArgumentError, match="complex64"):
        warmup([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    weight = nn.Parameter(torch.ones(2))
    optimizer = warmup([weight, *table.parameters()])
    (table(torch.tensor([1, 3])) * weight).sum().backward()
    with pytest.raises(ArgumentError, match="sparse") as caught:
        optimizer.step()
    assert "sparse=False" in caught.value.hint
    assert torch.equal(weight, torch.ones(2))
    assert optimizer.param_groups[0]["steps"] == 0
