"""What the runtime part does: exponents over steps, micro-batches, saved states, reports."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import StateError
from graphopt.ops.flex import UNKNOWN
from graphopt.runtime.session import Session
from graphopt.runtime.states import States
from graphopt.testing import check_runtime
from tests.flexpoint.models import (
    batch,
    conv_net,
    gradients,
    part_of,
    session_of,
    small_net,
    state_of,
    train,
)
from tests.flexpoint.oracle import Scalar
from tests.support.ranks import forked

SPEC = "cleanup,flexpoint"


def optimized(model: nn.Module, spec: str = SPEC, **options: Any) -> nn.Module:
    options = {"backend": "eager", "verify": "structure"} | options
    return graphopt.optimize(model, passes=spec, **options)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        "cleanup,flexpoint{rounding=stochastic,master_weights=false}",
        "cleanup,kfac{damping=0.3},flexpoint",
    ],
)
@pytest.mark.slow
@pytest.mark.distributed
def test_what_runtime_parts_owe(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    check_runtime(spec, model=small_net, ranks=spec != SPEC)  # on ranks together with kfac


def layers() -> nn.Module:
    """The same ones each time; a compiler is done with them soon."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 10))


@pytest.mark.parametrize(("make", "backend"), [(conv_net, "eager"), (layers, "inductor")])
def test_a_model_trains_and_is_verified(make: Callable[[], nn.Module], backend: str) -> None:
    plain, model = make(), optimized(make(), verify="eager", backend=backend)
    wanted, found = train(plain, 12), train(model, 12)
    assert "mismatch" not in model.explain()
    for one, other in zip(wanted, found, strict=True):
        assert abs(one - other) < 2e-3


@pytest.mark.parametrize("rule", ["paper", "code2016", "delayed"])
def test_exponents_are_those_of_the_oracle(rule: str) -> None:
    """From the magnitudes of the tensors themselves, seen by a hook of the graph's weights."""
    torch.manual_seed(0)
    model = optimized(nn.Linear(5, 3), f"flexpoint{{autoflex={rule},exponent=8}}")
    oracle = {name: Scalar(rule, 16, -126, 126) for name in ("x", "weight", "bias")}
    for step in range(24):
        x = torch.randn(4, 5) * 3.0 ** (step % 7)
        amax = {"x": x, "weight": model.weight, "bias": model.bias}
        wanted = {n: oracle[n].renew(float(v.detach().abs().max())) for n, v in amax.items()}
        model(x).sum().backward()
        with torch.no_grad():
            model.weight.mul_(1.3)
        part, state = part_of(model), state_of(model)
        found = dict(zip(part.names, state[f"exponents/{part.key}"].tolist(), strict=True))
        places = {"x": "input_1", "weight": "weight", "bias": "bias"}
        assert {n: found[places[n]] for n in wanted} == wanted


def test_a_step_reads_the_exponents_of_its_own_forward() -> None:
    """Two forwards in flight: the first backward renews what the second one must not see."""
    model, other = optimized(conv_net()), optimized(conv_net())
    for m in (model, other):
        train(m, 2)
    one, two = batch(7)[0], 50 * batch(8)[0]
    first, second = model(one).sum(), model(two).sum()
    first.backward()
    model.zero_grad()
    second.backward()
    saved = copy.deepcopy(other)  # as it was before either
    saved(two).sum().backward()
    assert torch.equal(gradients(model), gradients(saved))


def test_micro_batches_renew_once_with_the_largest() -> None:
    whole, parts = optimized(conv_net()), optimized(conv_net())
    for m in (whole, parts):
        train(m, 1)
    before = {n: t.clone() for n, t in state_of(parts).items()}
    key = part_of(parts).key
    images = torch.cat([batch(3)[0], 10 * batch(4)[0]])
    with parts.no_sync():
        parts(images[:16]).sum().backward()
    state = state_of(parts)
    waiting = state[f"waiting/{key}"]
    assert torch.equal(state[f"exponents/{key}"], before[f"exponents/{key}"])
    parts(images[16:]).sum().backward()
    assert f"waiting/{key}" not in state
    assert int(state[f"renewals/{key}"]) == 2
    row = part_of(parts).names.index("x")
    assert int(waiting[row, 0]) == int(images[:16].abs().max().view(torch.int32))
    whole(images[16:]).sum().backward()  # the larger half decides on the input
    assert state[f"exponents/{key}"][row] == state_of(whole)[f"exponents/{key}"][row]
    counted = state[f"counters/{key}"][row, 3] - before[f"counters/{key}"][row, 3]
    assert int(counted) == images.numel()


def test_other_batch_sizes_share_the_exponents() -> None:
    model = optimized(conv_net())
    train(model, 2)
    model(batch(5, 4)[0]).sum().backward()
    keys = [k for k in state_of(model) if k.startswith("exponents/")]
    assert keys == [f"exponents/{part_of(model).key}"]
    assert int(state_of(model)[f"renewals/{part_of(model).key}"]) == 3


def test_current_scaling_keeps_nothing_and_saturates_nothing() -> None:
    model = optimized(conv_net(), "flexpoint{autoflex=current}")
    train(model, 3)
    part, state = part_of(model), state_of(model)
    assert set(state[f"exponents/{part.key}"].tolist()) == {UNKNOWN}
    assert int(state[f"counters/{part.key}"][:, 1].sum()) == 0
    assert "none of elements saturated" in model.explain()


def test_inference_does_not_touch_the_state() -> None:
    model = optimized(conv_net())
    train(model, 2)
    before = {n: t.clone() for n, t in state_of(model).items()}
    with torch.no_grad():
        found = model.eval()(batch(1)[0])
        wanted = type(model).forward(model, batch(1)[0])
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-3
    assert state_of(model).keys() == before.keys()
    assert all(torch.equal(before[n], t) for n, t in state_of(model).items())


# -- bad input -------------------------------------------------------------------------------------


def test_zeros_keep_their_exponents() -> None:
    model = optimized(nn.Linear(4, 2), "flexpoint")
    model(torch.zeros(3, 4)).sum().backward()
    part, state = part_of(model), state_of(model)
    row = part.names.index("input_1")
    assert int(state[f"exponents/{part.key}"][row]) == UNKNOWN
    model(torch.ones(3, 4)).sum().backward()
    known = int(state[f"exponents/{part.key}"][row])
    assert known != UNKNOWN
    for _ in range(30):
        model(torch.zeros(3, 4)).sum().backward()
    assert int(state[f"exponents/{part.key}"][row]) == known


def test_a_huge_outlier_saturates_for_a_step_or_more_and_is_counted() -> None:
    model = optimized(nn.Linear(4, 2), "flexpoint{exponent=8}")
    x = torch.randn(64, 4)
    for _ in range(4):
        model(x).sum().backward()
    x[0, 0] = 1e6
    model(x).sum().backward()
    part, state = part_of(model), state_of(model)
    row = part.names.index("input_1")
    assert state[f"counters/{part.key}"][row].tolist()[1:] == [1, 0, 5 * x.numel(), 5, 1]
    for _ in range(8):
        model(x).sum().backward()
    assert int(state[f"counters/{part.key}"][row, 1]) < 8
    assert "saturated, in" in model.explain()


def test_nan_and_infinity_are_counted_and_said_once() -> None:
    model = optimized(nn.Linear(4, 2), "flexpoint")
    x = torch.randn(3, 4)
    model(x).sum().backward()
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    with pytest.warns(
        RuntimeWarning, match="1 NaN in 'input_1' became 0, since integers have none"
    ):
        model(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
    part, state = part_of(model), state_of(model)
    counters = state[f"counters/{part.key}"][part.names.index("input_1")]
    assert counters[1:3].tolist() == [4, 2]
    assert "flexpoint: 2 NaN in 1 tensors became 0" in model.explain()
    assert torch.isfinite(model.weight.grad).all()


def test_an_empty_batch() -> None:
    model = optimized(nn.Linear(4, 2), "flexpoint")
    model(torch.randn(3, 4)).sum().backward()
    before = {n: t.clone() for n, t in state_of(model).items() if "exponents" in n}
    model(torch.zeros(0, 4)).sum().backward()
    names, rows = part_of(model).names, state_of(model)
    exponents = f"exponents/{part_of(model).key}"
    row = names.index("input_1")
    assert rows[exponents][row] == before[exponents][row]


def test_a_loss_of_certain_probabilities() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy(torch.sigmoid(self.head(x)), y)

    plain, model = Loss(), optimized(Loss(), verify="eager")
    x, y = 30 * torch.randn(64, 4), torch.randint(0, 2, (64, 1)).float()
    for m in (plain, model):
        m(x, y).backward()
    assert float((gradients(model) - gradients(plain)).norm() / gradients(plain).norm()) < 1e-3


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "{rounding=stochastic,master_weights=false}"])
def test_resume_is_bit_equal(options: str) -> None:
    straight, resumed = (optimized(conv_net(), f"flexpoint{options}") for _ in range(2))
    train(straight, 4)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "passes": graphopt.state_dict(straight)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    graphopt.load_state_dict(resumed, saved["passes"])
    assert train(straight, 4, first=4) == train(resumed, 4, first=4)
    for name, value in graphopt.state_dict(straight).items():
        assert torch.equal(value, graphopt.state_dict(resumed)[name]), name


def test_a_state_that_is_loaded_into_a_running_model() -> None:
    model = optimized(conv_net())
    train(model, 3)
    saved = graphopt.state_dict(model)
    train(model, 3)
    graphopt.load_state_dict(model, saved)
    assert all(torch.equal(saved[n], v) for n, v in graphopt.state_dict(model).items())
    graphopt.load_state_dict(model, {}, strict=False)
    assert set(state_of(model)[f"exponents/{part_of(model).key}"].tolist()) == {UNKNOWN}
    train(model, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flexpoint/odd": torch.zeros(1)}, "the saved state has 'flexpoint/odd', which is not"),
        ({"flexpoint/exponents/KEY": torch.zeros(3)}, "has shape .3,. in the saved state and"),
        ({"flexpoint/queue/KEY": torch.zeros(3, 16)}, "has shape .3, 16. in the saved state and"),
    ],
)
def test_states_of_other_models_are_refused(change: dict[str, Tensor], message: str) -> None:
    model = optimized(conv_net())
    train(model, 1)
    key = part_of(model).key
    saved = graphopt.state_dict(model)
    saved |= {name.replace("KEY", key): value for name, value in change.items()}
    with pytest.raises(StateError, match=message):
        graphopt.load_state_dict(model, saved)


def test_the_state_of_another_model_is_refused() -> None:
    one, other = optimized(conv_net()), optimized(nn.Linear(4, 2))
    train(one, 1)
    other(torch.randn(3, 4)).sum().backward()
    with pytest.raises(StateError, match="the saved state lacks 'flexpoint/exponents/"):
        graphopt.load_state_dict(other, graphopt.state_dict(one))


def test_a_graph_that_is_made_within_a_trial_keeps_its_state() -> None:
    model = optimized(conv_net())
    with session_of(model).trial():
        model(batch()[0]).sum().backward()
    exponents = state_of(model)[f"exponents/{part_of(model).key}"]
    assert set(exponents.tolist()) == {UNKNOWN}
    model.zero_grad()
    train(model, 1)


def test_what_nested_trials_have_begun_is_as_it_was_then() -> None:
    session = Session(("demo",))
    states: States = session.states
    session.state("demo")["before"] = torch.zeros(1)
    with states.restored():
        with states.restored():
            session.state("demo")["late"] = torch.ones(1)
            states.needed("demo/late")
            session.state("demo")["late"].add_(1)
            session.state("demo")["unneeded"] = torch.ones(1)
        session.state("demo")["late"].add_(5)
    assert session.state("demo").keys() == {"before", "late"}
    assert session.state("demo")["late"].tolist() == [1.0]
