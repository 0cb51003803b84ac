"""Training with `kfac`: accumulation, staleness, saved state, other losses, and what goes wrong."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import StateError

Spec = str
EVERY = "kfac{damping=0.01,interval=1}"
STALE = "kfac{damping=0.01}"


def _net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _data(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def _optimized(spec: Spec = EVERY, backend: str = "eager") -> nn.Sequential:
    return graphopt.optimize(_net(), passes=spec, backend=backend)  # type: ignore[call-overload,no-any-return]


def _steps(
    model: nn.Module,
    first: int,
    last: int,
    *,
    parts: int = 1,
    optimizer: torch.optim.SGD | None = None,
) -> torch.optim.SGD:
    """Steps ``first`` to ``last - 1``, each on data of its own, in `parts` micro-batches."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for step in range(first, last):
        x, y = _data(seed=step)
        optimizer.zero_grad()
        *early, final = zip(x.chunk(parts), y.chunk(parts), strict=True)
        for a, b in early:
            with model.no_sync():  # type: ignore[operator]
                (F.cross_entropy(model(a), b) / parts).backward()
        (F.cross_entropy(model(final[0]), final[1]) / parts).backward()
        optimizer.step()
    return optimizer


def _distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("spec", [EVERY, STALE, "kfac{interval=1,solver=ekfac}"])
def test_micro_batches_equal_one_batch(spec: Spec) -> None:
    whole, parts = _optimized(spec), _optimized(spec)
    _steps(whole, 0, 5)
    _steps(parts, 0, 5, parts=4)
    # Rounding turns the eigenvectors of nearly equal eigenvalues.
    assert _distance(whole, parts) < (1e-9 if "ekfac" in spec else 1e-12)
    assert not [k for k in graphopt.state_dict(parts) if k.startswith("kfac/sum/")]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [EVERY, STALE, "kfac{interval=2,solver=eigen}"])
def test_inductor_equals_eager(spec: Spec) -> None:
    one, other = _optimized(spec), _optimized(spec, "inductor")
    _steps(one, 0, 4)
    _steps(other, 0, 4)
    assert _distance(one, other) < (1e-9 if "eigen" in spec else 1e-12)


def test_interval_renews_every_so_many_steps() -> None:
    model = _optimized("kfac{interval=3}")
    optimizer, seen = None, []
    for step in range(7):
        optimizer = _steps(model, step, step + 1, optimizer=optimizer)
        seen.append(graphopt.state_dict(model)["kfac/now/0.weight:A"])
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True]


def test_stale_statistics_follow_the_rule() -> None:
    """The same batch again and again: inputs of the first layer never change."""
    model = _optimized(STALE)
    x, y = _data()
    renewed = []
    for step in range(34):
        before = graphopt.state_dict(model).get("kfac/interval/0.weight:A")
        F.cross_entropy(model(x), y).backward()
        after = graphopt.state_dict(model)["kfac/interval/0.weight:A"]
        if before is None or not torch.equal(before, after):
            renewed.append(step)
    assert renewed == [0, 1, 2, 4, 7, 12, 20, 33]


def test_report_tells_how_often_statistics_are_renewed() -> None:
    model = _optimized(STALE)
    _steps(model, 0, 3)
    text = model.explain()  # type: ignore[operator]
    assert "kfac: after 3 steps 4 statistics are renewed every 1 to" in text


def test_stale_step_computes_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _optimized("kfac{interval=4}")
    calls = 0
    operator = torch.ops.graphopt.second_moment.default

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += function is operator
            return function(*args, **(kwargs or {}))

    counts = []
    for step in range(5):
        x, y = _data(seed=step)
        loss = F.cross_entropy(model(x), y)
        calls = 0
        with Counting():
            loss.backward()
        counts.append(calls)
    # The first stale step is compared with one that renews them.
    assert counts == [4, 4, 0, 0, 4]


@pytest.mark.parametrize("spec", [EVERY, STALE, "kfac{solver=ekfac,ema=0.5,interval=2}"])
def test_resumed_run_equals_uninterrupted_one(spec: Spec) -> None:
    whole = _optimized(spec)
    _steps(whole, 0, 9)
    first = _optimized(spec)
    optimizer = _steps(first, 0, 5)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), graphopt.state_dict(first)))
    second = _optimized(spec)
    second.load_state_dict(saved[0])
    graphopt.load_state_dict(second, saved[2])
    again = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.5)
    again.load_state_dict(saved[1])
    _steps(second, 5, 9, optimizer=again)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    )


def test_going_back_to_an_earlier_state() -> None:
    model = _optimized(STALE)
    _steps(model, 0, 1)
    early = graphopt.state_dict(model)
    _steps(model, 1, 6)
    graphopt.load_state_dict(model, early)
    assert graphopt.state_dict(model).keys() == early.keys()


@pytest.mark.parametrize("captured", [True, False])
def test_state_of_another_model_is_refused(captured: bool) -> None:
    other = graphopt.optimize(nn.Linear(4, 3).double(), passes=EVERY, backend="eager")
    x, y = _data()
    F.cross_entropy(other(x), y).backward()
    foreign = graphopt.state_dict(other)
    model = _optimized()
    if captured:
        _steps(model, 0, 1)
        before = graphopt.state_dict(model)

    def load() -> None:
        graphopt.load_state_dict(model, foreign)
        model(x)

    with pytest.raises(StateError, match=r"'kfac/(before|interval|now|solution)/0\.weight"):
        load()
    if captured:
        after = graphopt.state_dict(model)
        assert all(torch.equal(after[k], v) for k, v in before.items())


def test_scaled_losses_give_scaled_gradients() -> None:
    """A scaler multiplies the loss, and divides the gradients before the optimizer sees them."""
    x, y = _data()
    plain, scaled = _optimized(), _optimized()
    graphopt.use_scaler(scaled, torch.amp.GradScaler("cpu", init_scale=1024.0))
    F.cross_entropy(plain(x), y).backward()
    (1024.0 * F.cross_entropy(scaled(x), y)).backward()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad / 1024.0, rtol=1e-10)


def _curvature_of_outputs(fisher: str, loss: str, draws: int) -> list[Tensor]:
    """G of both layers, averaged over draws of labels."""
    model = _optimized(f"kfac{{interval=1,fisher={fisher},loss={loss}}}")
    x, y = _data()
    torch.manual_seed(0)
    found: list[list[Tensor]] = []
    for _ in range(draws):
        output = model(x)
        zeros = torch.zeros_like(output)
        (
            F.cross_entropy(output, y) if loss == "cross_entropy" else F.mse_loss(output, zeros)
        ).backward()
        state = graphopt.state_dict(model)
        found.append([state[f"kfac/now/{i}.weight:G"] for i in (0, 2)])
    return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_sampled_labels_approach_all_labels(loss: str) -> None:
    """The error of a mean over M draws falls as one over the root of M."""
    exact = _curvature_of_outputs("type2", loss, 1)
    few, many = (_curvature_of_outputs("mc", loss, m) for m in (6, 600))

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(((f - e).norm() / e.norm()).item() for f, e in pairs)

    assert error(many) < 0.06
    assert error(many) < error(few) / 3


@pytest.mark.parametrize("n", [1, 6])
def test_type_two_factors_of_a_deep_linear_network_are_the_ggn(n: int) -> None:
    """For squared error and linear layers the Jacobians do not depend on the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(n, 3, dtype=torch.float64)
    w1, w2 = (layer.weight.detach().clone() for layer in model)

    def output(w: Tensor) -> Tensor:
        return x @ w.view(4, 3).t() @ w2.t()

    jacobian = torch.autograd.functional.jacobian(output, w1.reshape(-1)).reshape(-1, 12)
    # mse_loss divides by all n * 2 elements; its second derivative by each output is 2 / (2 n).
    ggn = jacobian.t() @ jacobian / n
    spec = "kfac{interval=1,fisher=type2,loss=mse}"
    graphopt.optimize(model, passes=spec, backend="eager")
    F.mse_loss(model(x), torch.zeros(n, 2, dtype=torch.float64)).backward()
    state = graphopt.state_dict(model)
    g, a = (_full(state[f"kfac/now/0.weight:{side}"]) for side in "GA")
    assert torch.allclose(torch.kron(g, a), ggn, rtol=1e-10, atol=1e-12)


def _full(packed: Tensor) -> Tensor:
    size = int((2 * packed.shape[1]) ** 0.5)
    full = packed.new_zeros(size, size)
    rows, columns = torch.tril_indices(size, size)
    full[rows, columns] = packed[0]
    full[columns, rows] = packed[0]
    return full


# -- what goes wrong -------------------------------------------------------------------------------


def _poisoned(x: Tensor) -> Tensor:
    return x.clone().index_fill_(0, torch.tensor([0]), float("nan"))


def _overflowing(x: Tensor) -> Tensor:
    return x * 1e200


@pytest.mark.parametrize("spoil", [_poisoned, _overflowing])
def test_statistics_that_are_not_finite_are_not_taken(spoil: Callable[[Tensor], Tensor]) -> None:
    model = _optimized()
    x, y = _data()
    F.cross_entropy(model(x), y).backward()
    before = graphopt.state_dict(model)
    with pytest.warns(RuntimeWarning, match="the statistic '0.weight:A' was not finite"):
        F.cross_entropy(model(spoil(x)), y).backward()
    after = graphopt.state_dict(model)
    assert torch.equal(after["kfac/now/0.weight:A"], before["kfac/now/0.weight:A"])
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_first_statistics_that_are_not_finite_leave_gradients_plain() -> None:
    model, plain = _optimized(), _net()
    x, y = _data()
    x = x * 1e200
    with pytest.warns(RuntimeWarning, match="not finite"):
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    a, b = model[0].weight.grad, plain[0].weight.grad
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 3])
def test_singular_factors_and_batches_of_one(n: int) -> None:
    model = _optimized("kfac{damping=1e-8,interval=1}")
    x, y = _data(n)
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_zero_gradients_stay_zero() -> None:
    model = _optimized()
    (0.0 * model(_data()[0]).sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_batches_of_other_sizes_share_their_curvature() -> None:
    model = _optimized(STALE)
    for step, n in enumerate((8, 5, 8, 1, 8)):
        x, y = _data(n, seed=step)
        F.cross_entropy(model(x), y).backward()
    assert int(graphopt.state_dict(model)["kfac/step"]) == 5
    assert len(graphopt.model.surface.report(model).specialisations) == 3


class TwoHeads(nn.Module):
    """One of two heads may get no gradient in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.a(h), self.b(h)


def test_layer_without_data_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(TwoHeads().double(), passes=EVERY, backend="eager")
    x, _ = _data()
    a, b = model(x)
    (a.square().mean() + b.square().mean()).backward()
    before = graphopt.state_dict(model)
    model.zero_grad()
    model(x)[0].square().mean().backward()
    after = graphopt.state_dict(model)
    assert model.b.weight.grad is None
    assert torch.equal(before["kfac/now/b.weight:G"], after["kfac/now/b.weight:G"])
    assert not torch.equal(before["kfac/now/trunk.weight:G"], after["kfac/now/trunk.weight:G"])


def test_reduced_precision_models_keep_their_curvature_in_float32() -> None:
    model = graphopt.optimize(_net().bfloat16(), passes=EVERY, backend="eager")
    x, y = _data()
    F.cross_entropy(model(x.bfloat16()).float(), y).backward()
    tensors = graphopt.state_dict(model)
    kept = [v.dtype for k, v in tensors.items() if v.is_floating_point() and v.dim()]
    assert set(kept) == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype is torch.bfloat16 for p in model.parameters())


def test_warnings_come_once() -> None:
    model = _optimized()
    x, y = _data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            F.cross_entropy(model(x * 1e200), y).backward()
    assert len([w for w in caught if "'0.weight:A'" in str(w.message)]) == 1


_WRONG = {
    "now/0.weight:A": "(1, 3)",
    "before/0.weight:A": "(1, 3)",
    "interval/0.weight:A": "(2,)",
    "solution/0.weight/0/left_inverse": "(2, 2)",
    "solution/0.weight/0/damping": "(1,)",
}


@pytest.mark.parametrize("key", _WRONG)
@pytest.mark.parametrize("captured", [True, False])
def test_a_saved_tensor_of_another_shape_is_refused(key: str, captured: bool) -> None:
    model = _optimized(STALE)
    _steps(model, 0, 3)
    good = graphopt.state_dict(model)
    right = tuple(good[f"kfac/{key}"].shape)
    wrong = tuple(map(int, _WRONG[key].strip("(),").split(",")))
    state = {**good, f"kfac/{key}": torch.ones(wrong)}
    model = model if captured else _optimized(STALE)

    def load() -> None:
        graphopt.load_state_dict(model, state)
        _steps(model, 0, 1)

    with pytest.raises(StateError) as caught:
        load()
    assert (
        caught.value.message
        == f"'kfac/{key}' has shape {wrong} in the saved state and {right} here"
    )
    if captured:
        after = graphopt.state_dict(model)
        assert after.keys() == good.keys()
        assert all(torch.equal(after[k], v) for k, v in good.items())


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("solution/0.weight/0/left_inverse", lambda t: t * float("nan"), "is not finite in the"),
        ("now/0.weight:A", lambda t: t.half(), "has dtype float"),
        ("now/0.weight:A", lambda t: t.long(), "has dtype int64"),
        ("solution/0.weight/0/damping", lambda t: t * 0, "is not positive in the saved state"),
        ("step", lambda t: -t, "has a number that is none of it"),
        ("interval/0.weight:A", lambda t: t * 0, "has a number that is none of it: [0, 0, 0]"),
    ],
)
def test_values_that_no_step_can_work_with_are_refused(
    key: str, change: Callable[[Tensor], Tensor], said: str, captured: bool
) -> None:
    model = _optimized(STALE)
    _steps(model, 0, 3)
    good = graphopt.state_dict(model)
    state = {**good, f"kfac/{key}": change(good[f"kfac/{key}"])}
    target = model if captured else _optimized(STALE)

    def load() -> None:
        graphopt.load_state_dict(target, state)
        _steps(target, 0, 1)

    with pytest.raises(StateError, match=re.escape(said)):
        load()
    after = graphopt.state_dict(model)
    assert after.keys() == good.keys()
    assert all(torch.equal(after[k], v) for k, v in good.items())


def test_a_state_that_is_not_whole() -> None:
    model = _optimized(STALE)
    _steps(model, 0, 3)
    good = graphopt.state_dict(model)
    for key in ("kfac/step", "kfac/before/0.weight:A", "kfac/interval/0.weight:A"):
        cut = {k: v for k, v in good.items() if k != key}
        with pytest.raises(StateError, match="the saved state is not whole"):
            graphopt.load_state_dict(model, cut)
    with pytest.raises(StateError, match="has format 7, and this graphopt reads 1"):
        graphopt.load_state_dict(model, good | {"graphopt/format": torch.tensor(7 << 32)})
    with pytest.raises(StateError, match="has nothing of 'kfac', which has a state here"):
        graphopt.load_state_dict(model, {})
    graphopt.load_state_dict(model, {}, strict=False)
    assert graphopt.state_dict(model) == {}


@pytest.mark.parametrize("solver", ["factored", "eigen", "ekfac", "lowrank"])
def test_a_solution_is_loaded_as_a_whole(solver: str) -> None:
    model = _optimized(f"kfac{{interval=1,solver={solver}}}")
    _steps(model, 0, 2)
    good = graphopt.state_dict(model)
    graphopt.load_state_dict(model, good)
    prefix = "kfac/solution/0.weight/0/"
    for key in [k for k in good if k.startswith(prefix) and not k.endswith("/moments")]:
        with pytest.raises(StateError, match=f"the saved state lacks '{key}'"):
            graphopt.load_state_dict(model, {k: v for k, v in good.items() if k != key})
    with pytest.raises(StateError, match=f"has '{prefix}other' too many"):
        graphopt.load_state_dict(model, {**good, f"{prefix}other": torch.ones(1)})


def test_what_is_told_of_a_low_rank_solution_is_what_it_holds() -> None:
    model = nn.Sequential(nn.Linear(300, 3))
    graphopt.optimize(model, passes="kfac{interval=1,solver=lowrank}", backend="eager")
    model(torch.randn(4, 300)).sum().backward()
    good = graphopt.state_dict(model)
    assert good["kfac/solution/0.weight/0/right_basis"].shape == (1, 301, 64)
    graphopt.load_state_dict(model, good)
