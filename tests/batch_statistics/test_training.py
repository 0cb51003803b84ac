"""Training with `batch_statistics`: buffers against torch.var_mean, all else against eager."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import StateError
from tests.batch_statistics.models import SPEC, batch, check, net, optimized, seen, sgd, train


@pytest.mark.parametrize("last", [1, 3])
def test_buffers_are_statistics_of_the_last_steps_and_training_is_eager(last: int) -> None:
    plain, model = net(), optimized(net(), f"batch_statistics{{last={last}}}")
    one, other = sgd(plain), sgd(model)
    steps = []
    for step, size in enumerate([6, 6, 4, 9, 6]):  # unequal batches count by their values
        x = batch(step, size)
        steps.append(seen(plain, [x]))
        train(plain, one, [x])
        train(model, other, [x])
        check(model, steps[-last:])
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert a.grad is not None
            assert b.grad is not None
            assert torch.equal(a.grad, b.grad), name
    for name, buffer in plain.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(buffer, model.get_buffer(name)), name


def test_float32_statistics_are_good_to_a_few_roundings() -> None:
    plain, model = net().float(), optimized(net().float())
    x = batch(2).float()
    step = seen(plain, [x])
    train(model, sgd(model), [x])
    check(model, [step], rtol=1e-6)


def test_micro_batches_of_a_step_are_one_batch() -> None:
    plain, model = net(), optimized(net(), f"{SPEC}{{last=2}}")
    one, other = sgd(plain), sgd(model)
    steps = []
    for step in range(3):
        micro = [batch(10 * step + i, 4 + i) for i in range(3)]
        steps.append(seen(plain, micro))
        before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("mean")}
        train(plain, one, micro)
        train(model, other, micro)
        check(model, steps[-2:], rtol=1e-7)  # gradients of micro-batches are added in another order
        assert all(not torch.equal(b, model.get_buffer(n)) for n, b in before.items())
    assert not [key for key in graphopt.state_dict(model) if "waiting" in key]


def test_evaluation_state_and_export_need_no_call() -> None:
    model = optimized(net(), f"{SPEC},fold_inference")
    optimizer = sgd(model)
    for step in range(2):  # the second evaluation must not use what the first has folded
        steps = [seen(model, [batch(step)])]
        train(model, optimizer, [batch(step)])
        check(model, steps)
        plain = net()
        plain.load_state_dict(model.state_dict())
        plain.eval(), model.eval()
        x = batch(7)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
            exported = torch.export.export(plain, (x,)).module()
            torch.testing.assert_close(model(x), exported(x), rtol=1e-9, atol=1e-9)
        model.train()


class _Calls(nn.Module):
    """Calls of different kinds use different norms."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, which: str) -> Tensor:
        result: Tensor = getattr(self, which)(self.head(x))
        return result


def _moments(x: Tensor, norm: nn.BatchNorm1d) -> None:
    var, mean = torch.var_mean(x, 0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)


def test_norms_of_other_calls_keep_theirs_and_of_earlier_micro_batches_get_theirs() -> None:
    model: Any = optimized(_Calls().double(), "batch_statistics")
    x, y, z = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    model(x, "a").square().sum().backward()
    _moments(model.head(x), model.a)
    model(y, "b").square().sum().backward()
    _moments(model.head(x), model.a)
    _moments(model.head(y), model.b)
    with model.no_sync():
        model(z, "a").square().sum().backward()
    model(x, "b").square().sum().backward()  # the step ends in a call without the norm `a`
    _moments(model.head(z), model.a)
    _moments(model.head(x), model.b)


def test_a_call_without_backward_counts_in_no_step() -> None:
    plain, model = net(), optimized(net(), f"{SPEC}{{last=2}}")
    steps = [seen(plain, [batch(0)])]
    train(model, sgd(model), [batch(0)])
    with torch.no_grad():
        model(batch(3))  # in training mode: as in PyTorch, by the momentum
    model(batch(4))
    assert not torch.allclose(model.image.running_mean, model.image.running_mean.new_zeros(()))
    steps.append(seen(model, [batch(1)]))
    train(model, sgd(model), [batch(1)])
    check(model, steps)


def test_averages_over_a_whole_data_set_are_those_of_pytorch() -> None:
    model = optimized(net())
    train(model, sgd(model), [batch(0)])
    plain = net()
    plain.load_state_dict(model.state_dict())
    for one in (plain, model):
        torch.optim.swa_utils.update_bn([batch(i) for i in range(3)], one)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_two_calls_before_one_backward_are_two_steps() -> None:
    model = optimized(net(), f"{SPEC}{{last=2}}")
    steps = [seen(model, [batch(0)]), seen(model, [batch(1)])]
    (model(batch(0)).square().mean() + model(batch(1)).square().mean()).backward()
    check(model, steps)


def test_what_is_not_finite_leaves_again() -> None:
    model = optimized(net())
    model(batch(0)).mean().backward()
    model(batch(0) * float("nan")).mean().backward()
    assert model.image.running_mean.isnan().all()
    step = seen(model, [batch(1)])
    model(batch(1)).mean().backward()
    check(model, [step])


def test_a_second_backward_of_one_forward_counts_once() -> None:
    model = optimized(net(), f"{SPEC}{{last=3}}")
    step = seen(model, [batch(0)])
    loss = model(batch(0)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    check(model, [step])


def test_a_step_that_is_left_out_has_no_statistics() -> None:
    spec = f"{SPEC},precision{{format=fp16,policy=tf,cost=roofline}}"
    model: Any = optimized(net().float(), spec, verify="structure")
    optimizer = sgd(model)
    train(model, optimizer, [batch(0).float()])
    good = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    kept = {n: t for n, t in graphopt.state_dict(model).items() if "ring/" in n}
    optimizer.zero_grad()
    (model(batch(3).float()).square().mean() * 1e38).backward()
    assert all(p.grad is None for p in model.parameters())
    for name, buffer in good.items():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)
    state = graphopt.state_dict(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_beside_kfac() -> None:
    model = optimized(net(), "cleanup,batch_statistics,kfac{interval=1}")
    alone = optimized(net(), "cleanup,kfac{interval=1}")
    optimizers = sgd(model), sgd(alone)
    for step in range(3):
        steps = [seen(alone, [batch(step)])]
        train(model, optimizers[0], [batch(step)])
        train(alone, optimizers[1], [batch(step)])
        check(model, steps)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_synchronised_norms_of_one_process_and_images_in_any_layout() -> None:
    plain: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)).double()
    model = optimized(copy.deepcopy(plain), "batch_statistics")
    x = batch(1).contiguous(memory_format=torch.channels_last)
    step = seen(plain, [x])
    train(model, sgd(model), [x])
    check(model, [step])


@pytest.mark.slow
def test_inductor() -> None:
    plain = net()
    model: Any = graphopt.optimize(net(), passes=SPEC, backend="inductor")
    optimizer = sgd(model)
    for step in range(2):
        steps = [seen(model, [batch(step)])]
        train(model, optimizer, [batch(step)])
        check(model, steps, rtol=1e-6)
    assert plain.state_dict().keys() == model.state_dict().keys()


# -- state -----------------------------------------------------------------------------------------


def test_a_run_that_was_saved_goes_on_within_a_step() -> None:
    spec = f"{SPEC}{{last=3}}"
    straight, resumed = optimized(net(), spec), optimized(net(), spec)
    optimizer = sgd(straight)
    for step in range(2):
        train(straight, optimizer, [batch(step)])
    with straight.no_sync():
        straight(batch(5)).mean().backward()
    file = io.BytesIO()
    torch.save([straight.state_dict(), graphopt.state_dict(straight)], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    graphopt.load_state_dict(resumed, state)
    with resumed.no_sync():  # it knows its norms from its calls
        resumed(batch(6)).mean().backward()
    with straight.no_sync():
        straight(batch(6)).mean().backward()
    for model in (straight, resumed):
        model(batch(7)).mean().backward()
    for name, buffer in straight.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, resumed.get_buffer(name)), name
    assert "3 norms evaluate with the statistics of the last 3 steps" in straight.explain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: t[:1] for k, t in s.items() if t.dim()},
            r"ring/image.running_mean' has shape \(1, 9\) in the saved state and \(2, 9\)",
        ),
        (
            lambda s: {k.replace("running", "other"): t for k, t in s.items()},
            "the saved state lacks 'batch_statistics/ring/cumulative.running_mean'",
        ),
        (
            lambda s: {k.replace("ring/", "x/"): t for k, t in s.items()},
            "has 'batch_statistics/x/",
        ),
    ],
)
def test_a_state_of_another_model_is_refused(change: Any, message: str) -> None:
    model = optimized(net(), f"{SPEC}{{last=2}}")
    train(model, sgd(model), [batch(0)])
    state = graphopt.state_dict(model)
    with pytest.raises(StateError, match=message):
        graphopt.load_state_dict(model, change(state))
    graphopt.load_state_dict(model, state)


def test_functional_norms_with_buffers_of_their_own() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("m", torch.zeros(4))
            self.register_buffer("v", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.m, self.v, self.scale, training=True)  # type: ignore[arg-type]

    model = optimized(Functional(), "batch_statistics")
    x = torch.randn(7, 4)
    train(model, sgd(model), [x])
    var, mean = torch.var_mean(x, 0)
    torch.testing.assert_close(model.m, mean)
    torch.testing.assert_close(model.v, var)
