"""LARS against its formula in scalars, and the groups that keep the plain rate."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from graphopt.errors import ArgumentError
from graphopt.optim import LARC, LARS, DelayedSGD, groups, spike_compensation
from graphopt.study import ConstantDelay


def tensors(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    made = [scale * torch.randn(s, generator=random) for s in ((4, 3, 2), (5,), (3,))]
    return [t.double() for t in made]


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(t) for t in tensors(0)]
    with torch.no_grad():
        made[2].zero_()
    return made


def _length(values: Any) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.ravel(values)))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_steps_follow_algorithm_1(scale: float, decay: float) -> None:
    """With the rate of each step within the momentum, and a tensor of norm 0."""
    params = parameters()
    optimizer = LARS(params, 0.5, momentum=0.9, weight_decay=decay, trust=0.02)
    schedule = LambdaLR(optimizer, lambda step: (1 - step / 10) ** 2)
    weights = [p.detach().numpy().copy() for p in params]
    velocity = [np.zeros_like(w) for w in weights]
    for step in range(4):
        rate = 0.5 * (1 - step / 10) ** 2
        for i, g in enumerate(t.numpy() for t in tensors(step + 1, scale)):
            w = weights[i]
            zero = _length(w) == 0
            local = 1.0 if zero else 0.02 * _length(w) / (_length(g) + decay * _length(w))
            velocity[i] = 0.9 * velocity[i] + rate * local * (g + decay * w)
            weights[i] = w - velocity[i]
            params[i].grad = torch.from_numpy(g)
        optimizer.step()
        schedule.step()
    for p, w in zip(params, weights, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-10, atol=1e-14)


def test_groups_that_are_not_adaptive_are_momentum_sgd() -> None:
    ours, theirs = parameters(), parameters()
    split = [{"params": ours[:1]}, {"params": ours[1:], "adaptive": False}]
    first: Any = LARS(split, 0.1, momentum=0.9, weight_decay=0.1)
    larc = LARC(SGD([{"params": theirs[:1]}, {"params": theirs[1:], "adaptive": False}], 0.1, 0.9))
    plain = parameters()
    second = SGD(plain, 0.1, momentum=0.9, weight_decay=0.1)
    for group in larc.param_groups:
        group["weight_decay"] = 0.1
    for seed in range(3):
        for params in (ours, theirs, plain):
            for p, g in zip(params, tensors(seed + 1), strict=True):
                p.grad = g.clone()
        for optimizer in (first, larc, second):
            optimizer.step()
    for i in (1, 2):
        torch.testing.assert_close(ours[i], plain[i], rtol=1e-12, atol=1e-14)
        assert torch.equal(theirs[i], plain[i])
    assert not torch.allclose(ours[0], plain[0])
    assert not torch.allclose(theirs[0], plain[0])


def test_norms_and_biases_of_a_model_keep_the_plain_rate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    x = torch.randn(3, 4).double()
    plain = copy.deepcopy(model)
    optimizer = LARS(groups(model, x, weight_decay=0.0), 0.1, momentum=0.0, trust=1e-3)
    other = SGD(plain.parameters(), 0.1)
    for net, steps in ((model, optimizer), (plain, other)):
        net(x).square().sum().backward()
        steps.step()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12) == (name not in ("0.weight", "2.weight")), name


@pytest.mark.parametrize("kind", ["LARC", "LARS", "DelayedSGD"])
def test_gradient_lag_scales_late_gradients_by_the_weights_that_they_reach(kind: str) -> None:
    """Loss is |w - 3|^2 / 2, so that the gradient of step t is w_t - 3; lag 1, as Kurth et al."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer: Any = LARC(SGD([weight], 0.5), 0.1)
    compensation = (0.0, 1.0)
    if kind == "LARS":
        optimizer = LARS([weight], 0.5, momentum=0.0, trust=0.1)
    elif kind == "DelayedSGD":
        inner = DelayedSGD([weight], lr=0.5, momentum=0.5, delay=1)
        optimizer, compensation = LARC(inner, 0.1), spike_compensation(0.5, 1)
    training = ConstantDelay(optimizer, 1)
    w = np.array([1.0, -2.0])
    late, velocity = [], np.zeros(2)
    for step in range(6):
        late.append(w - 3)
        training.step(lambda: (weight - 3).square().sum() / 2)
        if step == 0:
            continue
        gradient = late[step - 1]
        local = 0.1 * _length(w) / _length(gradient)
        rate = 0.5 * local if kind == "LARS" else min(local, 0.5)
        scaled = rate / 0.5 * gradient
        velocity = 0.5 * velocity + scaled
        a, b = compensation
        w = w - 0.5 * (a * velocity + b * scaled)
        np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-12)


def test_states_and_copies() -> None:
    params = parameters()
    optimizer = LARS(params, 0.1)
    for p, g in zip(params, tensors(1), strict=True):
        p.grad = g
    optimizer.step()
    twin: Any = copy.deepcopy(optimizer)
    again = LARS(params, 0.1)
    again.load_state_dict(optimizer.state_dict())
    optimizer.step()
    for q, g in zip(twin.param_groups[0]["params"], tensors(1), strict=True):
        q.grad = g
    twin.step()
    moved = [p.detach().clone() for p in params]
    assert all(
        torch.equal(a, b) for a, b in zip(moved, twin.param_groups[0]["params"], strict=True)
    )
    buffers = [again.state[p]["momentum_buffer"] for p in params]
    assert all(bool(b.any()) for b in buffers)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": math.nan}, {"trust": 0.0}, {"momentum": 1.0}, {"weight_decay": -0.1}],
)
def test_bad_numbers(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        LARS(parameters(), **{"lr": 0.1, **options})


@pytest.mark.parametrize("make", [lambda p: LARS(p, 0.1), lambda p: LARC(SGD(p, 0.1))])
def test_sparse_gradients_and_missing_ones(make: Any) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    idle = nn.Parameter(torch.ones(2))
    optimizer = make([idle, table.weight])
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ArgumentError, match="sparse gradient"):
        optimizer.step()
    assert torch.equal(before, table.weight)
    table.weight.grad = table.weight.grad.to_dense()
    optimizer.step()
    assert not torch.equal(before, table.weight)
    assert torch.equal(idle, torch.ones(2))
