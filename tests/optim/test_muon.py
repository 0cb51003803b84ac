"""Muon against torch's on matrices, torch's AdamW on the rest, and on optimized models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import graphopt
from graphopt.errors import ArgumentError, CaptureError, StateError
from graphopt.optim import Muon, parameter_roles
from graphopt.optim.muon_groups import as_matrices, as_parameter
from graphopt.optim.orthogonal import BATCH, orthogonalised
from tests.support.models import Tied

MATRICES = {"0.weight", "2.weight", "5.weight", "7.weight"}


def net() -> nn.Sequential:
    """Two matrices of one shape, a tall one, a wide one, a norm and a head."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 8), nn.LayerNorm(8), nn.GELU()]
    layers += [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def step(model: Any, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad()
    model(batch(seed)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.5, "adjust_lr_fn": "original"},
        {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3, "weight_decay": 0.0},
    ],
)
def test_the_bits_of_torch_on_matrices_and_of_adamw_elsewhere(options: dict[str, Any]) -> None:
    ours, theirs = net(), net()
    optimizer = Muon(ours, batch(), 0.01, adamw_lr=0.003, **options)
    muon = torch.optim.Muon(
        [p for n, p in theirs.named_parameters() if n in MATRICES],
        lr=0.01,
        **{"adjust_lr_fn": "match_rms_adamw", **options},
    )
    decay = options.get("weight_decay", 0.1)
    rest = [p for n, p in theirs.named_parameters() if n not in MATRICES]
    plain = [{"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
    plain += [{"params": [p for p in rest if p.dim() == 2], "weight_decay": decay}]
    adamw = torch.optim.AdamW(plain, lr=0.003)
    for number in range(4):
        step(ours, optimizer, number)
        theirs.zero_grad()
        theirs(batch(number)).square().mean().backward()
        muon.step()
        adamw.step()
        if number == 0:  # later, what is not equal to the last bit shows in all gradients
            for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                if name in ("5.weight", "7.weight"):  # orthogonalised together
                    torch.testing.assert_close(a, b, rtol=0, atol=2**-7 * 0.01 * 2)
                else:
                    assert torch.equal(a, b), name
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_matrices_that_are_alone_have_the_bits_of_torch_for_many_steps() -> None:
    def alone() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3)]
        return nn.Sequential(*layers)

    ours, theirs = alone(), alone()
    optimizer = Muon(ours, batch(), 0.02, weight_decay=0.01)
    named = dict(theirs.named_parameters())
    first = torch.optim.Muon(
        [named["0.weight"], named["2.weight"]],
        lr=0.02,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    second = torch.optim.AdamW(
        [
            {"params": [named["4.weight"]], "weight_decay": 0.01},
            {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=0.02,
    )
    for number in range(10):
        step(ours, optimizer, number)
        theirs.zero_grad()
        theirs(batch(number)).square().mean().backward()
        first.step()
        second.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), count=st.integers(2, 5), s=st.integers(0)
)
@settings(max_examples=25, deadline=None)
def test_a_batch_is_as_each_of_its_matrices(rows: int, columns: int, count: int, s: int) -> None:
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(s % 2**63))
    together = orthogonalised(matrices).float()
    alone = torch.stack([orthogonalised(m) for m in matrices]).float()
    # Rounding to bfloat16 differs by at most one of the last bits per step and number.
    assert float((together - alone).norm()) <= 2**-6 * float(alone.norm())


def test_singular_values_come_close_to_one() -> None:
    """Against the singular value decomposition in double, and the scalar iteration."""
    torch.manual_seed(0)
    matrix = torch.randn(24, 60)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    x = s / matrix.double().norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = u @ torch.diag(x) @ v
    error = (orthogonalised(matrix).double() - expected).norm() / expected.norm()
    assert float(error) < 0.02
    assert float(x.min()) > 0.6
    assert float(x.max()) < 1.3


def test_convolutions_are_matrices_to_one_output() -> None:
    """The update of each kind of kernel, with the matrices made element by element."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Tanh()]
    layers += [nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False), nn.Tanh()]
    layers += [nn.Conv2d(4, 2, 3, bias=False), nn.Flatten(), nn.Linear(18, 2)]
    model, x = nn.Sequential(*layers), torch.randn(2, 4, 6, 6)
    optimizer = Muon(model, x, 0.1, weight_decay=0.0, nesterov=False, adjust_lr_fn="original")
    before = [layer.weight.detach().clone() for layer in (model[0], model[2], model[4])]
    model(x).square().sum().backward()
    optimizer.step()
    for layer, old in zip((model[0], model[2], model[4]), before, strict=True):
        gradient, change = layer.weight.grad * (1 - 0.95), (old - layer.weight.detach()) / 0.1
        transposed, groups = isinstance(layer, nn.ConvTranspose2d), layer.groups
        outputs, inputs = layer.out_channels // groups, layer.in_channels // groups
        points = old.shape[2] * old.shape[3]
        for group in range(groups):
            found, wanted = np.zeros((2, outputs, inputs * points))
            for o in range(outputs):
                for i in range(inputs):
                    a, b = (i, o) if transposed else (o, i)
                    a += group * (inputs if transposed else outputs)
                    part = slice(i * points, (i + 1) * points)
                    wanted[o, part] = gradient[a, b].flatten().numpy()
                    found[o, part] = change[a, b].flatten().numpy()
            target = orthogonalised(torch.from_numpy(wanted)).double()
            target *= math.sqrt(max(1, outputs / (inputs * points)))
            np.testing.assert_allclose(found, target, atol=0.02 * float(target.abs().max()))


def test_a_weight_stored_as_inputs_by_outputs_counts_by_what_it_does() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(6, 24)), nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(x @ self.weight))
            return y

    torch.manual_seed(0)
    found, x = {}, batch()
    model = Stored()
    for adjust in ("original", "match_rms_adamw"):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        optimizer = Muon(ours, x, 0.1, weight_decay=0.0, adjust_lr_fn=adjust)
        other = torch.optim.Muon([theirs.weight], 0.1, weight_decay=0.0, adjust_lr_fn=adjust)
        for net_, steps in ((ours, optimizer), (theirs, other)):
            net_(x).sum().backward()
            steps.step()
        moved = [(n.weight - model.weight).detach() for n in (ours, theirs)]
        found[adjust] = float(moved[0].norm() / moved[1].norm())
        if adjust == "match_rms_adamw":
            assert torch.equal(ours.weight, theirs.weight)
    # Four times as many outputs as inputs; torch takes them for inputs.
    assert found["original"] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        ((1, 5, 12, "out_in"), (5, 3, 2, 2)),
        ((2, 3, 8, "in_out_kernel"), (4, 3, 4)),
        ((3, 4, 2, "in_out"), (3, 2, 4)),
    ],
)
def test_views_can_be_undone(view: Any, shape: tuple[int, ...]) -> None:
    value = torch.arange(math.prod(shape)).view(shape)
    assert torch.equal(as_parameter(as_matrices(value, view), view, shape), value)


# -- training --------------------------------------------------------------------------------------


def _kept(model: Any, make: Callable[[Any], Any], steps: int, seed: int = 0) -> list[Tensor]:
    optimizer = make(model)
    for number in range(steps):
        step(model, optimizer, seed + number)
    return [p.detach().clone() for p in model.parameters()]


def test_on_optimized_models() -> None:
    """The roles come from the model's own capture, before passes rewrite it."""
    model = graphopt.optimize(net(), batch(), passes="cleanup", backend="eager")
    actual = _kept(model, lambda m: Muon(m, lr=0.01), 3)
    expected = _kept(net(), lambda m: Muon(m, batch(), 0.01), 3)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_gradients_of_products_in_lower_precision() -> None:
    spec = "cleanup,precision{cost=roofline,policy=tf}"
    model: Any = graphopt.optimize(net(), batch(), passes=spec, backend="eager")
    assert "aten.mm.default runs in bf16" in model.explain()
    plain = net()
    optimizer, other = Muon(model, lr=0.01), Muon(plain, batch(), 0.01)
    named = [[(g["method"], g["param_names"]) for g in o.param_groups] for o in (optimizer, other)]
    assert named[0] == named[1]
    # Orthogonalising amplifies rounding where a gradient has no rank: so the same gradients.
    model(batch()).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_states_schedules_and_copies() -> None:
    def run(resume: bool) -> list[Tensor]:
        model = net()
        optimizer: Any = Muon(model, batch(), 0.01)
        schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
        for number in range(4):
            if resume and number == 2:
                saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
                optimizer = Muon(model, parameter_roles(model, batch()), 1.0)
                schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
                optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
            step(model, optimizer, number)
            schedule.step()
        assert {g["lr"] for g in optimizer.param_groups} == {0.01 / 5}
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))
    model = net()
    pair: Any = copy.deepcopy([model, Muon(model, batch(), 0.01)])
    alone = _kept(net(), lambda m: Muon(m, batch(), 0.01), 1)
    step(pair[0], pair[1], 0)
    assert all(torch.equal(a, b) for a, b in zip(pair[0].parameters(), alone, strict=True))


def test_a_tied_table_is_trained_by_adamw_and_a_later_group_too() -> None:
    model = Tied()
    optimizer = Muon(model, torch.randint(0, 11, (4, 5)), 0.01)
    found = {n: g["method"] for g in optimizer.param_groups for n in g["param_names"]}
    assert found == {"embed.weight": "adamw", "mix.weight": "muon", "mix.bias": "adamw"}
    more = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [("more", more)], "lr": 0.5})
    more.grad = torch.ones(3, 3)
    optimizer.step()
    torch.testing.assert_close(more.detach(), torch.full((3, 3), 0.5), rtol=1e-5, atol=0)


def test_what_has_no_gradient_stays() -> None:
    model = net()
    model.register_parameter("idle", nn.Parameter(torch.ones(4, 4)))
    optimizer = Muon(model, batch(), 0.1)
    model[5].requires_grad_(False)  # frozen after the optimizer was made
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, 0)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, old) == (name in ("idle", "5.weight", "5.bias")), name
    model.zero_grad()
    after = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters(), strict=True))
    assert optimizer.step(lambda: 3.0) == 3.0


def test_many_matrices_are_cut_into_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BATCH == 2**26
    expected = _kept(net(), lambda m: Muon(m, batch(), 0.01), 2)
    monkeypatch.setattr("graphopt.optim.orthogonal.BATCH", 64)
    actual = _kept(net(), lambda m: Muon(m, batch(), 0.01), 2)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


# -- bad input -------------------------------------------------------------------------------------


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if float(y.sum()) > 0 else -y


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Muon(net(), batch(), 0.0), ArgumentError, "lr=0.0"),
        (lambda: Muon(net(), batch(), math.nan), ArgumentError, "lr=nan"),
        (lambda: Muon(net(), batch(), adamw_lr=-1.0), ArgumentError, "adamw_lr=-1.0"),
        (lambda: Muon(net(), batch(), weight_decay=-1.0), ArgumentError, "weight_decay"),
        (lambda: Muon(net(), batch(), momentum=1.0), ArgumentError, "momentum=1.0"),
        (lambda: Muon(net(), batch(), betas=(0.9, 1.0)), ArgumentError, "betas[1]"),
        (lambda: Muon(net(), batch(), ns_steps=100), ArgumentError, "ns_steps"),
        (lambda: Muon(net(), batch(), adjust_lr_fn="rms"), ArgumentError, "'rms'"),
        (lambda: Muon(net()), ArgumentError, "no example"),
        (lambda: Muon(Breaks(), batch()), CaptureError, "test_muon.py"),
        (lambda: Muon(Complex(), batch()), ArgumentError, "parameter 'weight'"),
        (lambda: Muon(net().requires_grad_(False), batch()), ArgumentError, "gradient"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert says in str(raised.value)


def test_a_sparse_gradient_changes_nothing() -> None:
    model = Tied()
    optimizer = Muon(model, torch.randint(0, 11, (4, 5)), 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.embed.weight.grad = torch.ones(11, 6).to_sparse()
    with pytest.raises(ArgumentError, match="sparse gradient") as raised:
        optimizer.step()
    assert "embed.weight" in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_state_of_another_model_is_refused() -> None:
    first = Muon(net(), batch(), 0.01)
    torch.manual_seed(0)
    other = nn.Sequential(*net()[:8], nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(StateError, match="matrices"):
        Muon(other, batch(), 0.01).load_state_dict(first.state_dict())


def test_a_group_without_a_job() -> None:
    with pytest.raises(ArgumentError, match="no job runs"):
        Muon(net(), batch(), 0.01, process_group=cast("Any", object()))
