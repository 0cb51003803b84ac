"""DelayedSGD against torch.optim.SGD, scalar oracles and its own saved state."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError
from graphopt.optim import DelayedSGD, delayed_nadam, spike_compensation

SHAPES = ((4, 3, 2, 2), (4,), (3, 5), ())


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, dtype=dtype, generator=random)) for s in SHAPES]


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    """Gradients that do not depend on the weights; the scalar has none in odd steps."""
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=random)
                if p.dim() == 0 and step % 2:
                    p.grad = None
        optimizer.step()


def equal(first: list[nn.Parameter], second: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- what it is without delay ----------------------------------------------------------------------


@pytest.mark.parametrize("rebind", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_delay_it_is_sgd_bit_for_bit(
    momentum: float, options: dict[str, Any], rebind: bool
) -> None:
    ours, theirs = parameters(), parameters()
    train(DelayedSGD(ours, lr=0.1, momentum=momentum, rebind=rebind, **options), 6)
    train(torch.optim.SGD(theirs, lr=0.1, momentum=momentum, **options), 6)
    assert equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_one_update_of_delay_is_nesterov_bit_for_bit(options: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    train(DelayedSGD(ours, lr=0.1, momentum=0.9, delay=1, **options), 6)
    train(torch.optim.SGD(theirs, lr=0.1, momentum=0.9, nesterov=True, **options), 6)
    assert equal(ours, theirs)


def test_nesterov_at_any_delay() -> None:
    ours, theirs = parameters(), parameters()
    train(DelayedSGD(ours, lr=0.1, momentum=0.99, delay=9, compensation="nesterov"), 6)
    train(torch.optim.SGD(theirs, lr=0.1, momentum=0.99, nesterov=True), 6)
    assert equal(ours, theirs)


def test_delayed_nadam_is_nadam_with_large_momentum_and_decoupled_decay() -> None:
    ours, theirs = parameters(), parameters()
    train(delayed_nadam(ours, 1e-2, weight_decay=0.1), 6)
    nadam = torch.optim.NAdam(
        theirs, 1e-2, betas=(0.99, 0.999), weight_decay=0.1, decoupled_weight_decay=True
    )
    train(nadam, 6)
    assert equal(ours, theirs)


# -- the rules, one number at a time ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "a", "b"),
    [
        ({}, 0.9**5, (1 - 0.9**5) / (1 - 0.9)),
        ({"compensation": spike_compensation(0.9, 10)}, 0.9**10, (1 - 0.9**10) / (1 - 0.9)),
        ({"compensation": (0.3, 2.5)}, 0.3, 2.5),
        ({"compensation": "none"}, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("decoupled", [False, True])
def test_update_is_the_formula(
    options: dict[str, Any], a: float, b: float, decoupled: bool
) -> None:
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = DelayedSGD(
        [weight],
        lr=0.1,
        momentum=0.9,
        delay=5,
        weight_decay=0.05,
        decoupled_weight_decay=decoupled,
        **options,
    )
    w, v = 2.0, 0.0
    for gradient in (1.0, -0.5, 0.25, 3.0):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        if decoupled:
            w *= 1 - 0.1 * 0.05
            g = gradient
        else:
            g = gradient + 0.05 * w
        v = 0.9 * v + g
        w -= 0.1 * (a * v + b * g)
        assert weight.item() == pytest.approx(w, rel=1e-13)


def test_groups_have_delays_of_their_own() -> None:
    together, alone = parameters(), parameters()
    groups = [{"params": [p], "delay": d} for p, d in zip(together, (6, 4, 2, 0), strict=True)]
    train(DelayedSGD(groups, lr=0.1), 4)
    random = torch.Generator().manual_seed(1)
    optimizers = [
        DelayedSGD([p], lr=0.1, delay=d) for p, d in zip(alone, (6, 4, 2, 0), strict=True)
    ]
    for step in range(4):
        for p, optimizer in zip(alone, optimizers, strict=True):
            p.grad = torch.randn(p.shape, generator=random)
            if p.dim() == 0 and step % 2:
                p.grad = None
            optimizer.step()
    assert equal(together, alone)


# -- prediction ------------------------------------------------------------------------------------


def predictions(steps: int = 4, **options: Any) -> list[Tensor]:
    weights = parameters(dtype=torch.float64)
    optimizer = DelayedSGD(weights, lr=0.1, momentum=0.9, delay=3, **options)
    train(optimizer, steps)
    predicted = optimizer.predict()
    return [predicted[w] for w in weights]


def test_velocity_and_weight_form_are_one_for_plain_momentum() -> None:
    velocity = predictions(5, compensation="none", prediction="velocity")
    weight = predictions(5, compensation="none", prediction="weight")
    for a, b in zip(velocity, weight, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_they_differ_with_compensation() -> None:
    velocity, weight = predictions(prediction="velocity"), predictions(prediction="weight")
    assert not torch.allclose(velocity[0], weight[0])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("compensation", ["none", "spike"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("horizon", [None, 7])
def test_geometric_prediction_is_what_updates_without_gradient_reach(
    compensation: Any, decoupled: bool, horizon: int | None, maximize: bool
) -> None:
    weights = parameters(dtype=torch.float64)
    optimizer = DelayedSGD(
        weights,
        lr=0.1,
        momentum=0.9,
        delay=3,
        compensation=compensation,
        prediction="geometric",
        horizon=horizon,
        weight_decay=0.2,
        decoupled_weight_decay=decoupled,
        maximize=maximize,
    )
    train(optimizer, 3)
    predicted = optimizer.predict()
    expected = [predicted[w] for w in weights]
    for _ in range(3 if horizon is None else horizon):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    for a, b in zip(expected, weights, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-12)


def test_linear_prediction_repeats_the_decoupled_decay() -> None:
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = DelayedSGD(
        [weight],
        lr=0.1,
        delay=4,
        prediction="velocity",
        weight_decay=0.5,
        decoupled_weight_decay=True,
    )
    weight.grad = torch.tensor([3.0], dtype=torch.float64)
    optimizer.step()
    expected = weight.item() - 4 * 0.1 * (3.0 + 0.5 * weight.item())
    assert optimizer.predict()[weight].item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("prediction", ["velocity", "weight", "geometric"])
def test_weights_come_back_bit_for_bit(prediction: Any) -> None:
    weights = parameters()
    optimizer = DelayedSGD(weights, lr=0.1, delay=5, prediction=prediction)
    train(optimizer, 3)
    before = [w.detach().clone() for w in weights]
    expected = optimizer.predict()
    with optimizer.predicted():
        assert all(torch.equal(w, expected[w]) for w in weights)
        assert not torch.equal(weights[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    with pytest.raises(ZeroDivisionError), optimizer.predicted():
        _ = 1 // 0
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_before_the_first_update_the_prediction_is_the_weight() -> None:
    weights = parameters()
    for form in ("velocity", "weight", "geometric"):
        predicted = DelayedSGD(weights, delay=5, prediction=form).predict()
        assert all(torch.equal(predicted[w], w) for w in weights)
    assert DelayedSGD(weights, delay=5).predict() == {}


@pytest.mark.parametrize("inside", [False, True])
def test_a_backward_sees_the_weights_of_its_place(inside: bool) -> None:
    """Also of operators that save a view of the weight (linear) or itself (convolution)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2, 1))
    optimizer = DelayedSGD(model.parameters(), lr=0.1, delay=5, prediction="velocity")
    images = torch.randn(4, 2, 3, 3, requires_grad=True)
    model(images).sum().backward()
    optimizer.step()
    predicted = copy.deepcopy(model)
    for mine, theirs in zip(predicted.parameters(), optimizer.predict().values(), strict=True):
        mine.data = theirs
    with optimizer.predicted():
        result = model(images).sum()
        if inside:
            (found,) = torch.autograd.grad(result, images)
    if not inside:
        (found,) = torch.autograd.grad(result, images)
    # The gradient of a map that is linear in its input depends on the weights only.
    (expected,) = torch.autograd.grad((predicted if inside else model)(images).sum(), images)
    assert torch.equal(found, expected)


# -- braking ---------------------------------------------------------------------------------------


def test_without_strength_braking_is_sgd_bit_for_bit() -> None:
    for granularity in ("global", "tensor", "filter"):
        ours, theirs = parameters(), parameters()
        train(DelayedSGD(ours, lr=0.1, compensation="none", braking=granularity, rho=0.0), 6)
        train(torch.optim.SGD(theirs, lr=0.1, momentum=0.9), 6)
        assert equal(ours, theirs)


def scalar_braking(
    weights: list[Tensor], gradients: list[list[Tensor]], granularity: str, rho: float
) -> list[Tensor]:
    """Braked SGD with momentum 0.9 and lr 0.1, number by number."""
    blocks: list[list[tuple[int, int]]] = []  # (parameter, element) that share a cosine
    for index, weight in enumerate(weights):
        count = weight.numel()
        rows = weight.shape[0] if granularity == "filter" and weight.dim() > 1 else 1
        per = count // rows
        blocks += [[(index, r * per + e) for e in range(per)] for r in range(rows)]
    if granularity == "global":
        blocks = [[element for block in blocks for element in block]]
    w = [weight.flatten().tolist() for weight in weights]
    v = [[0.0] * weight.numel() for weight in weights]
    for step in gradients:
        g = [gradient.flatten().tolist() for gradient in step]
        for block in blocks:
            inner = math.fsum(g[i][e] * v[i][e] for i, e in block)
            size = math.sqrt(math.fsum(g[i][e] ** 2 for i, e in block))
            size *= math.sqrt(math.fsum(v[i][e] ** 2 for i, e in block))
            alpha = 1 - rho * (inner / size if size else 0.0)
            for i, e in block:
                v[i][e] = 0.9 * v[i][e] + alpha * g[i][e]
                w[i][e] -= 0.1 * v[i][e]
    return [
        torch.tensor(values, dtype=torch.float64).reshape(weight.shape)
        for values, weight in zip(w, weights, strict=True)
    ]


@pytest.mark.parametrize("granularity", ["global", "tensor", "filter"])
def test_granularities_against_a_scalar_oracle(granularity: Any) -> None:
    weights = parameters(dtype=torch.float64)
    random = torch.Generator().manual_seed(5)
    gradients = [
        [torch.randn(s, dtype=torch.float64, generator=random) for s in SHAPES] for _ in range(4)
    ]
    expected = scalar_braking([w.detach() for w in weights], gradients, granularity, 1.5)
    # Two groups: a global cosine is over both.
    groups = [{"params": weights[:2]}, {"params": weights[2:]}]
    optimizer = DelayedSGD(groups, lr=0.1, compensation="none", braking=granularity, rho=1.5)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient
        optimizer.step()
    for found, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-11, atol=1e-12)


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebind", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "velocity"},
        {"prediction": "weight", "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"prediction": "geometric", "braking": "filter"},
    ],
)
def test_resumed_training_is_bit_equal(options: dict[str, Any], rebind: bool) -> None:
    whole = parameters()
    optimizer = DelayedSGD(whole, lr=0.1, delay=3, rebind=rebind, **options)
    train(optimizer, 4)
    file = io.BytesIO()
    torch.save(([w.detach() for w in whole], optimizer.state_dict()), file)
    file.seek(0)
    saved, state = torch.load(file)
    resumed = [nn.Parameter(w) for w in saved]
    again = DelayedSGD(resumed, lr=0.7, rebind=rebind)
    again.load_state_dict(state)
    for each in (optimizer, again):
        train(each, 3, seed=9)
    assert equal(whole, resumed)
    first, second = optimizer.predict(), again.predict()
    assert all(torch.equal(first[a], second[b]) for a, b in zip(whole, resumed, strict=True))


def test_rebinding_keeps_the_old_weights_alive() -> None:
    weights = parameters()
    optimizer = DelayedSGD(weights, lr=0.1, delay=2, rebind=True)
    before = [w.detach().clone() for w in weights]
    shared = [w.data for w in weights]
    train(optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(shared, before, strict=True))
    assert not torch.equal(weights[0], before[0])


def test_an_update_between_forward_and_backward_is_noticed_by_autograd() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = DelayedSGD([weight], lr=0.1)
    loss = (weight**2).sum()
    weight.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(torch.tensor(3.0))
    optimizer = DelayedSGD([weight], lr=0.5, momentum=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight**2 / 2
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.5
    assert weight.item() == 1.5


# -- warnings and refusals -------------------------------------------------------------------------


def test_long_predictions_warn_once_with_numbers() -> None:
    groups = [{"params": [p], "delay": 32 * i} for i, p in enumerate(parameters())]
    with pytest.warns(RuntimeWarning) as found:
        DelayedSGD(groups, lr=0.1, momentum=0.9, prediction="weight")
    (message,) = [str(w.message) for w in found]
    assert "delay=96 with momentum=0.9" in message
    assert "is 9.6, over 3" in message
    assert "below 0.00098; without prediction and with compensation='spike' the limit is" in message


def test_harmless_settings_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DelayedSGD(parameters(), momentum=0.9, delay=200)
        DelayedSGD(parameters(), momentum=0.9, delay=30, prediction="velocity")
        DelayedSGD(parameters(), momentum=0.999, delay=500, prediction="velocity")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"delay": -1}, "delay=-1 is no number of updates"),
    ({"delay": 1.5}, "delay=1.5 is no number of updates"),
    ({"rho": -1.0}, "rho=-1.0 is out of range"),
    ({"lr": -0.1}, "lr=-0.1 is out of range"),
    ({"lr": math.nan}, "lr=nan is out of range"),
    ({"momentum": 1.0}, "momentum=1.0 is out of range"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1 is out of range"),
    ({"horizon": -2}, "horizon=-2 is out of range"),
    ({"prediction": "linear"}, "prediction='linear' is unknown"),
    ({"braking": "layer"}, "braking='layer' is unknown"),
    ({"compensation": "sc"}, "compensation='sc' is unknown"),
    ({"compensation": (1.0,)}, r"compensation=\(1.0,\) is unknown"),
    ({"compensation": (1.0, math.inf)}, "is unknown"),
    ({"prediction": "geometric", "horizon": 2.5}, "horizon=2.5 is no whole number"),
    ({"fused": True}, "a fused step is refused"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DelayedSGD(parameters(), **options)
    optimizer = DelayedSGD(parameters()[:1])
    with pytest.raises(ArgumentError, match=message) as raised:
        optimizer.add_param_group({"params": parameters()[1:], **options})
    assert raised.value.where == "parameter group 1"
    assert len(optimizer.param_groups) == 1


def test_parameters_and_gradients_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"a parameter of torch.complex64"):
        DelayedSGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = DelayedSGD([weight])
    weight.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(ArgumentError, match="a sparse gradient cannot be used"):
        optimizer.step()
    with pytest.raises(ArgumentError, match=r"beta1=1.0"):
        delayed_nadam([weight], beta1=1.0)


def test_a_delay_that_is_set_is_checked_and_warned_about() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = DelayedSGD([weight], 0.1, momentum=0.5, prediction="velocity")
    with pytest.warns(RuntimeWarning, match="stable"):
        optimizer.set_delay(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_delay(8)  # it is known
    with pytest.raises(ArgumentError, match="delay"):
        optimizer.set_delay(-1)
    assert optimizer.param_groups[0]["delay"] == 8
