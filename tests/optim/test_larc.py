"""LARC against its formula in scalars, and around the optimizers of PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from graphopt.errors import ArgumentError
from graphopt.optim import LARC


def parameters() -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=random) for s in ((4, 3, 2, 2), (5,))]
    return [nn.Parameter(t.double()) for t in (*tensors, torch.zeros(3))]


def gradients(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=random).double() for p in parameters()]


def give(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()


def _rate(w: np.ndarray, g: np.ndarray, lr: float, trust: float, decay: float, clip: bool) -> float:
    """Element by element, as the module's text defines it."""
    size = math.sqrt(sum(x * x for x in w.flatten().tolist()))
    slope = math.sqrt(sum(x * x for x in g.flatten().tolist()))
    if size == 0 or slope == 0:
        return lr
    local = trust * size / (slope + decay * size)
    return min(local, lr) if clip else local


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_steps_of_sgd_are_those_of_the_formula(
    scale: float, decay: float, maximize: bool, clip: bool
) -> None:
    params = parameters()
    larc = LARC(SGD(params, 0.1, weight_decay=decay, maximize=maximize), 0.02, clip=clip)
    grads = gradients(1, scale)
    grads[1].zero_()
    before = [p.detach().numpy().copy() for p in params]
    give(params, grads)
    larc.step()
    for p, w, g in zip(params, before, grads, strict=True):
        rate = _rate(w, g.numpy(), 0.1, 0.02, decay, clip)
        down = (-1 if maximize else 1) * g.numpy() + decay * w
        np.testing.assert_allclose(p.detach().numpy(), w - rate * down, rtol=1e-12, atol=1e-15)


def test_a_step_moves_no_layer_by_more_than_trust() -> None:
    params = parameters()[:2]
    before = [p.detach().clone() for p in params]
    larc = LARC(SGD(params, 10.0), 0.002)
    give(params, gradients(1, 1e4)[:2])
    larc.step()
    for p, w in zip(params, before, strict=True):
        assert float((p.detach() - w).norm() / w.norm()) == pytest.approx(0.002)


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_small_gradients_leave_any_optimizer_as_it_is(make: Callable[..., Optimizer]) -> None:
    ours, theirs = parameters()[:2], parameters()[:2]
    first = LARC(make(ours, lr=1e-3, weight_decay=0.1), 0.02)
    second = make(theirs, lr=1e-3, weight_decay=0.1)
    for seed in range(3):
        give(ours, gradients(seed, 0.01)[:2])
        give(theirs, gradients(seed, 0.01)[:2])
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_decoupled_weight_decay_is_left_to_the_optimizer() -> None:
    params, plain = parameters(), parameters()
    give(params, gradients(1, 1e3))
    LARC(AdamW(params, 0.1, weight_decay=0.5), 0.02).step()
    # The first step of Adam has the size of lr, whatever the factor of the gradient.
    give(plain, gradients(1, 1e3))
    AdamW(plain, 0.1, weight_decay=0.5).step()
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adam_does_not_feel_how_large_an_outlier_is() -> None:
    def trained(size: float, wrap: Callable[[Optimizer], Optimizer]) -> list[nn.Parameter]:
        params = parameters()[:2]
        optimizer = wrap(Adam(params, 1e-3))
        for seed, scale in enumerate((1.0, 1.0, size, 1.0, 1.0)):
            give(params, gradients(seed, scale)[:2])
            optimizer.step()
        return params

    for a, b in zip(trained(1e2, LARC), trained(1e4, LARC), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    plain = zip(trained(1e2, lambda o: o), trained(1e4, lambda o: o), strict=True)
    assert all(float((a - b).detach().abs().max()) > 1e-5 for a, b in plain)


def test_schedules_states_and_copies() -> None:
    def trained(steps: int, resume: bool) -> list[nn.Parameter]:
        params = parameters()
        larc: Any = LARC(SGD(params, 0.1, momentum=0.9), 0.02)
        scheduler = LambdaLR(larc, lambda step: 1 / (1 + step))
        for seed in range(steps):
            if resume and seed == 2:
                again = LARC(SGD(params, 0.1, momentum=0.9), 0.02)
                rest = LambdaLR(again, lambda step: 1 / (1 + step))
                again.load_state_dict(copy.deepcopy(larc.state_dict()))
                rest.load_state_dict(scheduler.state_dict())
                larc, scheduler = again, rest
            give(params, gradients(seed))
            larc.step()
            scheduler.step()
        assert larc.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (1 + steps))
        return params

    straight, resumed = trained(4, False), trained(4, True)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_copy_steps_its_own_parameters() -> None:
    params = parameters()
    larc = LARC(SGD(params, 0.1), 0.02, clip=False)
    twin = copy.deepcopy(larc)
    assert (twin.trust, twin.clip) == (0.02, False)
    (group,) = twin.param_groups
    give(group["params"], gradients(1))
    twin.step()
    assert not torch.equal(group["params"][0], params[0])
    larc.step()
    assert torch.equal(params[0], parameters()[0])


def test_a_warm_up_from_zero_and_groups_added_later() -> None:
    params = parameters()
    larc = LARC(SGD(params[:1], 0.0), 0.02, clip=False)
    larc.add_param_group({"params": params[1:], "lr": 0.1})
    assert len(larc.optimizer.param_groups) == 2
    give(params, gradients(1))
    larc.step()
    assert torch.equal(params[0], parameters()[0])
    assert not torch.equal(params[1], parameters()[1])


def test_a_closure_makes_the_gradients() -> None:
    params = parameters()
    larc = LARC(SGD(params, 0.1), 0.02)

    def closure() -> float:
        give(params, gradients(1, 1e3))
        return 3.0

    assert larc.step(closure) == 3.0
    assert float(params[0].grad.norm()) < 1e-2 * float(gradients(1, 1e3)[0].norm())


@pytest.mark.parametrize("trust", [0.0, -1.0, math.nan, math.inf])
def test_bad_trust(trust: float) -> None:
    with pytest.raises(ArgumentError, match="trust"):
        LARC(SGD(parameters(), 0.1), trust)
