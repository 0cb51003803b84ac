"""Dynamic loss scaling: what is scaled, what overflows, and who skips the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis import gradient_order
from graphopt.errors import ArgumentError, StateError
from graphopt.passes.precision import Precision
from graphopt.testing import check_runtime
from tests.precision.test_pass import QUICK
from tests.support.ranks import forked

SPEC = "cleanup,precision{format=fp16,cost=roofline}"


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.body(x)))
        return y


def _made(spec: str = SPEC, backend: str = "eager") -> tuple[nn.Module, nn.Module]:
    """A plain model and an optimized copy of it."""
    torch.manual_seed(0)
    plain = Net()
    model = graphopt.optimize(copy.deepcopy(plain), passes=spec, backend=backend)
    return plain, model


def _batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 16, generator=generator)


def _state(model: nn.Module, key: str) -> Tensor:
    return graphopt.state_dict(model)[f"precision/{key}"]


@pytest.mark.distributed
def test_what_a_runtime_part_owes(monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    check_runtime([Precision(format="fp16", cost="roofline")])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_too_small_for_float16_survive(backend: str) -> None:
    x = next(_batches(1))
    grads = {}
    for scaling in ("dynamic", "none"):
        plain, model = _made(f"cleanup,precision{{format=fp16,cost=roofline,loss_scale={scaling}}}")
        for net in (plain, model):
            (net(x).square().sum() * 1e-9).backward()  # far below 2^-24, float16's least number
        grads[scaling] = model.body.weight.grad
        exact = plain.body.weight.grad
    assert grads["none"].abs().max() == 0
    assert (grads["dynamic"] - exact).abs().max() <= 0.02 * exact.abs().max()


def test_a_step_that_overflows_is_skipped_and_the_scale_halved() -> None:
    _, model = _made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index, x in enumerate(_batches(4)):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        momentum = copy.deepcopy(optimizer.state_dict()["state"])
        (model(x).square().sum() * (1e3 if index == 2 else 1e-3)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        same = all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
        assert same is (index == 2)
        if index == 2:
            after = optimizer.state_dict()["state"]
            for key, entry in momentum.items():
                assert torch.equal(entry["momentum_buffer"], after[key]["momentum_buffer"])
    assert _state(model, "scale") == 2.0**15
    assert (_state(model, "skipped"), _state(model, "steps")) == (1, 4)
    assert _state(model, "changes").tolist() == [[3, 15]]
    assert "scaled by 32768; 1 of 4 steps were left out" in model.explain()


def test_the_scale_grows_after_a_row_of_clean_steps() -> None:
    _, model = _made()
    model(next(_batches(1))).mean().backward()
    state = graphopt.state_dict(model)
    state["precision/clean"].fill_(1999)
    graphopt.load_state_dict(model, state)
    model(next(_batches(1))).mean().backward()
    assert _state(model, "scale") == 2.0**17
    assert _state(model, "clean") == 0


def test_the_scale_never_falls_below_one() -> None:
    _, model = _made()
    for x in _batches(20):
        model(x * float("nan")).mean().backward()
    assert _state(model, "scale") == 1.0
    assert all(p.grad is None for p in model.parameters())
    assert "overflow without any scale" in model.explain()


def test_one_bad_micro_batch_leaves_the_whole_step_out() -> None:
    _, model = _made()
    good, bad, last = _batches(3)
    for net_input in (good, bad * float("inf")):
        with model.no_sync():
            model(net_input).mean().backward()
    model(last).mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert _state(model, "skipped") == 1
    model(last).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def _calls_twice(model: nn.Module, one: Tensor, two: Tensor) -> None:
    (model(one).mean() - model(two).mean()).backward()


def _two_backwards(model: nn.Module, one: Tensor, two: Tensor) -> None:
    model(one).mean().backward()
    model(two).mean().backward()


@pytest.mark.parametrize("step", [_calls_twice, _two_backwards])
@pytest.mark.parametrize("bad", [0, 1])
def test_one_overflow_leaves_out_all_that_the_optimizer_step_is_made_of(
    step: Callable[..., None], bad: int
) -> None:
    _, model = _made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index, (one, two) in enumerate(zip(_batches(3), _batches(3), strict=True)):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        batches = [one, two * 0.5]
        if index == 1:
            batches[bad] = batches[bad] * float("inf")
        step(model, *batches)
        optimizer.step()
        same = all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
        assert same is (index == 1)


def test_accumulation_adds_true_gradients() -> None:
    plain, model = _made()
    one, two = _batches(2)
    with model.no_sync():
        model(one).mean().backward()
    model(two).mean().backward()
    for x in (one, two):
        plain(x).mean().backward()
    for ours, exact in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - exact.grad).abs().max() <= 0.01 * exact.grad.abs().max()


def test_the_users_own_scaler_takes_over() -> None:
    plain, model = _made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    graphopt.use_scaler(model, scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skipped = 0
    for x in _batches(8):
        optimizer.zero_grad()
        before = scaler.get_scale()
        scaler.scale(model(x).square().sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
    assert skipped > 0
    assert scaler.get_scale() < 2.0**20
    assert _state(model, "scale") == 1.0
    assert "scaler given to graphopt.use_scaler" in model.explain()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(plain.body.weight, model.body.weight)


def test_resuming_goes_on_with_scale_and_history() -> None:
    _, model = _made()
    for x in _batches(2):
        (model(x).square().sum() * 1e3).backward()
    saved = graphopt.state_dict(model)
    _, other = _made()
    graphopt.load_state_dict(other, saved)
    for net in (model, other):
        net.zero_grad()
        (net(next(_batches(1))).square().sum() * 1e-3).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    after = graphopt.state_dict(other)
    for key, value in graphopt.state_dict(model).items():
        assert torch.equal(value, after[key])


@pytest.mark.filterwarnings("ignore:the saved state is not finite")
@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan"), -1.0, 3.0, 1e-30])
def test_a_scale_that_cannot_be_loaded(scale: float) -> None:
    _, model = _made()
    model(next(_batches(1))).mean().backward()
    saved = graphopt.state_dict(model)
    broken = dict(saved, **{"precision/scale": torch.tensor(scale)})
    with pytest.raises(StateError, match="a scale is a power of two"):
        graphopt.load_state_dict(model, broken)
    assert _state(model, "scale") == 2.0**16


def test_kfac_keeps_its_statistics_where_a_step_is_skipped() -> None:
    spec = "cleanup,kfac{damping=0.1},precision{format=fp16,cost=roofline}"
    _, model = _made(spec)
    good, again = _batches(2)
    model(good).square().mean().backward()
    kept = {k: v for k, v in graphopt.state_dict(model).items() if k.startswith("kfac/")}
    model.zero_grad()
    model(again * 1e30).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    after = graphopt.state_dict(model)
    assert kept.keys() == {k for k in after if k.startswith("kfac/")}
    assert all(torch.equal(value, after[key]) for key, value in kept.items())


def test_kfac_sees_unscaled_statistics() -> None:
    x = next(_batches(1))
    found = {}
    for spec in (
        "cleanup,kfac{damping=0.1}",
        "cleanup,kfac{damping=0.1},precision{format=fp16,cost=roofline}",
    ):
        _, model = _made(spec)
        model(x).square().mean().backward()
        state = graphopt.state_dict(model)
        found[spec] = {k: v for k, v in state.items() if k.startswith("kfac/now/")}
    plain, lowered = found.values()
    for key, value in plain.items():
        assert (lowered[key] - value).abs().max() <= 0.02 * value.abs().max()


def test_verification_knows_the_rounding_of_gradients_that_cancel() -> None:
    """The scale would overflow with random cotangents, and no rounding be known of a gradient."""
    torch.manual_seed(0)
    # The bias in front of the batch norm has no gradient but rounding.
    plain = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
    model = graphopt.optimize(plain, passes=SPEC, backend="eager", verify="eager")
    model(torch.randn(32, 16)).square().mean().backward()
    assert "within tolerance" in str(model.explain())
    assert float(_state(model, "scale")) == 2.0**16


def test_bf16_needs_no_scale() -> None:
    _, model = _made("cleanup,precision{cost=roofline}")
    model(next(_batches(1))).mean().backward()
    assert graphopt.state_dict(model) == {}


def test_a_layer_in_front_learns_nothing_from_an_overflow() -> None:
    torch.manual_seed(0)
    front, (_, model) = nn.Linear(16, 16), _made()
    for scale in (1e-3, 1e30):
        front.zero_grad()
        model.zero_grad()
        (model(front(next(_batches(1)))).square().mean() * scale).backward()
    assert all(p.grad is None for p in (*front.parameters(), *model.parameters()))
    assert _state(model, "skipped") == 1


def test_a_scaler_that_is_disabled() -> None:
    _, model = _made()
    with pytest.raises(ArgumentError, match="the GradScaler is disabled"):
        graphopt.use_scaler(model, torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize(
    ("key", "value"), [("changes", torch.zeros(3, 5)), ("clean", torch.tensor(-5))]
)
def test_a_history_that_cannot_be_loaded(key: str, value: Tensor) -> None:
    _, model = _made()
    model(next(_batches(1))).mean().backward()
    broken = graphopt.state_dict(model) | {f"precision/{key}": value}
    with pytest.raises(StateError, match="is not what loss scaling saves"):
        graphopt.load_state_dict(model, broken)
