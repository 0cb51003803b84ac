"""Weights without a float32 copy, and what prediction is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from tests.flexpoint.models import batch, conv_net, part_of, state_of, train


def _optimized(model: nn.Module, options: str, **more: str) -> nn.Module:
    settings = {"backend": "eager", "verify": "structure"} | more
    return graphopt.optimize(model, passes=f"cleanup,flexpoint{{{options}}}", **settings)  # type: ignore[arg-type]


def _is_flex(value: Tensor, exponent: int) -> bool:
    mantissas = value.double() / 2.0**exponent
    return bool((mantissas == mantissas.round()).all() and (mantissas.abs() <= 32767).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_parameters_hold_flex_values_only(rounding: str) -> None:
    model = _optimized(conv_net(), f"master_weights=false,rounding={rounding}")
    wide = _optimized(conv_net(), f"rounding={rounding}")
    losses, others = train(model, 10), train(wide, 10)
    for one, other in zip(losses, others, strict=True):
        assert abs(one - other) < 0.02
    part = part_of(model)
    exponents = state_of(model)[f"exponents/{part.key}"].clone()
    with torch.enable_grad():
        model(batch()[0])  # what the optimizer wrote last is rounded when a step begins
    for name, parameter in model.named_parameters():
        assert _is_flex(parameter.detach(), int(exponents[part.weights[name]])), name
    assert not _is_flex(wide.head.weight.detach(), int(exponents[part.weights["head.weight"]]))


def test_a_copy_in_float32_keeps_what_is_less_than_a_unit() -> None:
    lost = []
    for weights in ("true", "false"):
        model = _optimized(nn.Linear(4, 2), f"master_weights={weights}")
        x = torch.randn(3, 4)
        for _ in range(3):
            model(x).sum().backward()
            with torch.no_grad():
                model.weight.mul_(1.0)  # a write
        model(x)
        before = model.weight.detach().clone()
        for _ in range(20):
            model(x).sum().backward()
            with torch.no_grad():
                model.weight.add_(1e-7)
        model(x)
        lost.append(float((model.weight.detach() - before).abs().max()) < 1e-6)
    assert lost == [False, True]


def test_frozen_parameters_stay() -> None:
    model = conv_net()
    model.mix.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _optimized(model, "master_weights=false", verify="full")
    images, labels = batch()
    F.cross_entropy(model(images), labels).backward()
    assert torch.equal(model.mix.weight, before["mix.weight"])
    assert "mix.weight" not in part_of(model).weights


def test_verification_leaves_no_trace_in_the_weights() -> None:
    plain = _optimized(conv_net(), "master_weights=false")
    checked = _optimized(conv_net(), "master_weights=false", verify="full")
    assert train(plain, 3) == train(checked, 3)
    for one, other in zip(plain.parameters(), checked.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_weight_is_rounded_once_per_write() -> None:
    """Two forwards in flight share the weights, as in eager."""
    model = _optimized(conv_net(), "master_weights=false")
    train(model, 2)
    first, second = model(batch(5)[0]).sum(), model(batch(6)[0]).sum()
    first.backward()
    second.backward()
    model(batch(7)[0])  # the exponents are others now, and the weights were not written to
    with torch.no_grad():
        model.head.weight.add_(0.01)
    later = model(batch(5)[0]).sum()
    with torch.no_grad():
        model.head.weight.add_(0.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_saturated_weights_are_counted() -> None:
    model = _optimized(nn.Linear(4, 2), "master_weights=false,exponent=8")
    x = torch.randn(3, 4)
    for _ in range(3):
        model(x).sum().backward()
    with torch.no_grad():
        model.weight.mul_(100)
    model(x).sum().backward()
    part = part_of(model)
    counters = state_of(model)[f"counters/{part.key}"][part.weights["weight"]]
    assert int(counters[1]) > 0


# -- what prediction is for ------------------------------------------------------------------------


def _losses(exponent: int | None) -> tuple[float, float]:
    """First and last loss of a run; with one exponent for all tensors, or with predicted ones."""
    images, labels = batch(0, 64)
    model = conv_net()
    graphopt.optimize(model, (images,), passes="cleanup,flexpoint", backend="eager", verify="off")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        if exponent is not None:
            state_of(model)[f"exponents/{part_of(model).key}"].fill_(exponent)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_fixed_exponents_do_not_train() -> None:
    start, predicted = _losses(None)
    assert predicted < 0.8 * start
    for exponent in (-24, -4):  # activations saturate, and gradients vanish
        _, fixed = _losses(exponent)
        assert not fixed < 0.99 * start, exponent
