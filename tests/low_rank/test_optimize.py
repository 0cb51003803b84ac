"""`low_rank` in a model: what runs, what is compared, what is saved, and what an error leaves."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture_forward
from graphopt.errors import ArgumentError, MismatchError, StateError
from graphopt.model import parametrize
from graphopt.passes.low_rank import LowRank
from graphopt.structured.flat import Flat
from graphopt.structured.weight import StructuredWeight
from tests.low_rank.models import ANY, CHANNELS, TOKENS, Mixer, batch

IN_FACTORS = {"mix.weight", "convolve", "left"}


def _optimized(model: nn.Module, x: Tensor, spec: str = ANY, **options: Any) -> nn.Module:
    options = {"verify": "off", "backend": "eager"} | options
    made = graphopt.optimize(model, (x,), passes=spec, **options)
    assert isinstance(made, nn.Module)
    return made


def _weights(model: nn.Module) -> set[str]:
    return {n.replace("parametrizations.", "").rpartition(".original0")[0] for n, _ in
            model.named_parameters() if n.endswith("original0")}  # fmt: skip


def _close(a: Tensor, b: Tensor, bound: float = 1e-3) -> None:
    off, size = (a - b).detach().abs().max(), b.detach().abs().max()
    assert float(off) <= bound * float(size)


# -- running ---------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_model_with_weights() -> None:
    plain, x = Mixer(), batch()
    model = _optimized(Mixer(), x, f"{ANY},cleanup", verify="full")
    assert _weights(model) == IN_FACTORS
    out, expected = model(x), plain(x)
    _close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name in ("mix.bias", "out.weight", "out.bias", "dense.bias"):
        _close(model.get_parameter(name).grad, plain.get_parameter(name).grad)
    # The chain rule: a gradient of factors is that of the weight through their product.
    for name in sorted(IN_FACTORS):
        path, _, tensor = name.rpartition(".")
        owner = model.get_submodule(path)
        entry: Any = owner.parametrizations
        factors = [p for _, p in entry[tensor].named_parameters()]
        by: StructuredWeight = entry[tensor][0]
        dense = by.form.dense(factors)
        grads = torch.autograd.grad(dense, factors, plain.get_parameter(name).grad)
        for factor, grad in zip(factors, grads, strict=True):
            assert factor.grad is not None
            _close(factor.grad, grad)


def test_the_forward_multiplies_without_the_weight() -> None:
    model = _optimized(Mixer(), batch(), ANY)
    (step,) = graphopt.model.surface.report(model).specialisations[0].steps
    whats = {a.site: a.what for a in step.outcome.applied}
    assert whats.keys() == IN_FACTORS
    assert all(what.startswith("multiplied in factors") for what in whats.values())
    assert {d.site: d.reason for d in step.outcome.declined} == {
        "out.weight": "small",
        "dense.weight": "full-rank",
    }
    rows = step.outcome.tables["weights"]
    assert {row["site"] for row in rows} == {*IN_FACTORS, "dense.weight"}
    assert "error=" in model.explain()
    # And the graph that the converted model is rewritten to is that of the decision.
    text = graphopt.print_graph(capture_forward(model, (batch(),), forward=Mixer.forward))
    assert text.count("structured_dense") == 3


@pytest.mark.parametrize("mode", ["train", "no_grad", "other shape"])
def test_later_calls_keep_the_factors(mode: str) -> None:
    plain, x = Mixer(), batch()
    model = _optimized(Mixer(), x)
    before = {name: p.clone() for name, p in model.named_parameters()}
    if mode == "other shape":
        x = torch.cat([x, x])
    with torch.set_grad_enabled(mode != "no_grad"):
        _close(model(x), plain(x))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    last = graphopt.model.surface.report(model).specialisations[-1].steps[0].outcome
    assert {a.site for a in last.applied} == IN_FACTORS


def test_batches_of_other_sizes_share_a_graph() -> None:
    plain, x = Mixer(), batch()
    model = _optimized(Mixer(), x, f"{ANY},cleanup", verify="structure")
    for n in (5, 2, 7):
        x = torch.randn(n, TOKENS, CHANNELS)
        results = []
        for m in (model, plain):
            m.zero_grad()
            y = m(x)
            y.square().sum().backward()
            results.append([y, m.get_parameter("mix.bias").grad])
        for a, b in zip(*results, strict=True):
            _close(a, b)
    last = graphopt.model.surface.report(model).specialisations
    assert [[str(size) for size in entry.sizes] for entry in last] == [[], ["x.0 2.."]]
    assert {a.site for a in last[-1].steps[0].outcome.applied} == IN_FACTORS


def test_factors_train() -> None:
    model, x = _optimized(Mixer(), batch()), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        _close(model(x), Mixer.forward(model, x), 1e-4)


def test_optimizing_again_keeps_the_forms() -> None:
    model = _optimized(Mixer(), batch())
    before = dict(model.named_parameters())
    _optimized(model, batch(), f"{ANY},cleanup")
    # Nothing is left to decide, so nothing has to be given.
    graphopt.optimize(model, passes=ANY, backend="eager", verify="off")
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in model.named_parameters())
    _close(model(batch()), Mixer()(batch()))


def test_a_copy_has_its_own_factors() -> None:
    model = _optimized(Mixer(), batch())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    _close(model(batch()), Mixer()(batch()))
    assert float((twin(batch()) - model(batch())).detach().abs().max()) > 0.1
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)  # as of every module with torch's parametrizations


def test_frozen_weights_and_shared_modules() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mixer()
            self.again = self.mixer.mix
            self.mixer.left.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.again(self.mixer(x).transpose(1, 2))
            return rows.transpose(1, 2)

    plain, x = Twice(), batch()
    model = _optimized(Twice(), x, verify="eager")
    _close(model(x), plain(x))
    left = [p for n, p in model.named_parameters() if ".left." in n]
    assert left
    assert not any(p.requires_grad for p in left)


# -- saving ----------------------------------------------------------------------------------------


def test_dense_state_dicts_both_ways() -> None:
    model, x = _optimized(Mixer(), batch()), batch()
    plain = Mixer()
    state = graphopt.dense_state_dict(model)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    plain.load_state_dict(state)
    with torch.no_grad():
        for name in sorted(IN_FACTORS):  # exactly
            path, _, tensor = name.rpartition(".")
            made = getattr(model.get_submodule(path), tensor)
            assert torch.equal(plain.get_parameter(name), made)
        _close(plain(x), Mixer.forward(model, x), 1e-6)
    # Back: other weights of the same forms, into the same parameters.
    other = _optimized(Mixer(), x)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    before = dict(model.named_parameters())
    errors = graphopt.load_dense_state_dict(model, graphopt.dense_state_dict(other))
    assert errors.keys() == IN_FACTORS
    assert max(errors.values()) < 1e-5
    assert all(p is before[name] for name, p in model.named_parameters())
    _close(model(x), other(x), 1e-4)


def test_a_weight_that_does_not_fit_its_form_is_refused() -> None:
    model = _optimized(Mixer(), batch())
    state = graphopt.dense_state_dict(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state["left"] = torch.randn(TOKENS, TOKENS)
    with pytest.raises(StateError, match="'left' is off by") as told:
        graphopt.load_dense_state_dict(model, state)
    assert "larger tolerance" in told.value.hint
    errors = graphopt.load_dense_state_dict(model, state, tolerance=float("inf"))
    assert errors["left"] > 0.5
    for wrong, message in (
        ({k: v for k, v in state.items() if k != "left"}, "has no such weight"),
        (state | {"left": torch.ones(2, 2)}, r"has shape \[2, 2\]|has shape \(2, 2\)"),
        (state | {"left": state["left"] * float("nan")}, "not finite"),
        (state | {"more": torch.ones(2)}, "the state has 'more'"),
        (state | {"mix.bias": torch.ones(2)}, "'mix.bias' has shape"),
    ):
        model.load_state_dict(before)
        with pytest.raises(StateError, match=message):
            graphopt.load_dense_state_dict(model, wrong, tolerance=float("inf"))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_run_continues_from_its_factors() -> None:
    """Bit for bit, with the state of the optimizer."""
    x = batch()

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model = _optimized(Mixer(), x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 2)
    again = Mixer()
    assert set(graphopt.restructure(again, saved[0])) == IN_FACTORS
    again.load_state_dict(saved[0])
    _optimized(again, x)
    other = torch.optim.Adam(again.parameters(), lr=1e-3)
    other.load_state_dict(saved[1])
    steps(again, other, 2)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_factors_of_another_model_are_refused() -> None:
    state = _optimized(Mixer(), batch()).state_dict()
    plain = nn.Linear(3, 3)
    with pytest.raises(StateError, match="fit no weight here"):
        graphopt.restructure(plain, state)
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert graphopt.restructure(plain, plain.state_dict()) == ()


# -- errors ----------------------------------------------------------------------------------------


def _as_it_was(model: nn.Module, before: dict[str, nn.Parameter], kinds: list[type]) -> None:
    assert list(dict(model.named_parameters())) == list(before)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model, "explain")
    _close(model(batch()), Mixer()(batch()), 1e-6)


def _breaks(self: Flat, factors: Any, x: Tensor) -> Tensor:
    left, right = factors
    return (left @ (right @ x)) * 1.05


@pytest.mark.parametrize("what", ["products", "factors"])
def test_a_wrong_pass_is_caught_and_the_model_is_as_it_was(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mixer()
    before, kinds = dict(model.named_parameters()), [type(m) for m in model.modules()]
    if what == "products":
        monkeypatch.setattr(Flat, "matmul", _breaks)
        message = "pass 'low_rank' promises lowered"
    else:
        right = StructuredWeight.right_inverse
        wrong = lambda self, w: tuple(f * 1.1 for f in right(self, w))  # noqa: E731
        monkeypatch.setattr(StructuredWeight, "right_inverse", wrong)
        message = "with the factors of pass 'low_rank'"
    with pytest.raises(MismatchError, match=message):
        _optimized(model, batch(), verify="eager")
    monkeypatch.undo()
    _as_it_was(model, before, kinds)


def test_a_warning_lets_it_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StructuredWeight.right_inverse
    wrong = lambda self, w: tuple(f * 1.1 for f in right(self, w))  # noqa: E731
    monkeypatch.setattr(StructuredWeight, "right_inverse", wrong)
    with pytest.warns(UserWarning, match="with the factors of pass 'low_rank'"):
        model = _optimized(Mixer(), batch(), verify="eager", on_mismatch="warn")
    assert _weights(model) == IN_FACTORS


def test_an_error_behind_leaves_the_model_as_it_was() -> None:
    model = Mixer()
    before, kinds = dict(model.named_parameters()), [type(m) for m in model.modules()]
    with pytest.raises(ArgumentError, match="matches no module"):
        _optimized(model, batch(), f"{ANY},precision{{keep=nowhere}}")
    _as_it_was(model, before, kinds)


def test_without_example_inputs_it_says_so() -> None:
    model = Mixer()
    with pytest.raises(ArgumentError, match="'low_rank' replaces parameters") as told:
        graphopt.optimize(model, passes="low_rank")
    assert "example_inputs" in told.value.hint
    assert type(model) is Mixer


def test_an_optimizer_made_before_is_refused_at_its_first_step() -> None:
    model = Mixer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    others = set(parametrize._gone)  # that other tests still hold
    _optimized(model, batch())
    assert set(parametrize._gone) - others
    model(batch()).sum().backward()
    with pytest.raises(StateError, match=r"holds '(left|convolve|mix\.weight)'") as told:
        optimizer.step()
    assert "after graphopt.optimize" in told.value.hint
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    del optimizer, told
    gc.collect()
    assert not set(parametrize._gone) - others  # nobody holds them any more


def test_a_dry_run_leaves_the_model_alone() -> None:
    model = Mixer()
    before, kinds = dict(model.named_parameters()), [type(m) for m in model.modules()]
    plan = graphopt.optimize(model, (batch(),), passes=f"{ANY},cleanup", dry_run=True)
    assert isinstance(plan, graphopt.Plan)
    names = plan.signature.names(graphopt.Role.PARAM)
    assert "mix.parametrizations.weight.original0" in names
    assert "mix.weight" not in names
    _as_it_was(model, before, kinds)


def test_an_ordinary_model_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(CHANNELS, 300), nn.ReLU(), nn.Linear(300, 300))
    before = dict(model.named_parameters())
    spec = "low_rank{cost=roofline},cleanup"
    _optimized(model, torch.randn(4, CHANNELS), spec, verify="full")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert "full-rank" in graphopt.model.surface.report(model).explain()


def test_the_class_of_the_root_stays_where_it_has_no_weight_of_its_own() -> None:
    model = nn.Sequential(Mixer())
    _optimized(model, batch())
    assert type(model) is nn.Sequential
    assert isinstance(model[0], Mixer)


def test_numerics_follow_the_tolerance() -> None:
    assert str(LowRank(tolerance=1e-4).numerics) == "lowered(0.001)"
