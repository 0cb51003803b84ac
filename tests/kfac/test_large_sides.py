"""Sides larger than `max_dim`: low rank plus a diagonal, with an error that is told and holds."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError
from graphopt.model.controller import controller_of
from graphopt.ops import low_rank
from graphopt.passes.kfac import Kfac
from graphopt.plan.kfac import LOW_RANK
from graphopt.runtime.kfac.eigen import Eigen
from graphopt.runtime.kfac.ekfac import Ekfac
from graphopt.runtime.kfac.factored import Factored
from graphopt.runtime.kfac.interval import similar
from graphopt.runtime.kfac.lowrank import LowRank
from graphopt.runtime.kfac.packing import unpack
from graphopt.runtime.kfac.solve import Problem
from tests.kfac.brute_force import expected, factors
from tests.kfac.cases import case
from tests.kfac.curvature_problems import gradient, moment
from tests.kfac.explicit import compute

operators = torch.ops.graphopt


def _rows(count: int, size: int, seed: int, decay: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, count, size, generator=generator, dtype=torch.float64)
    return rows * torch.arange(1, size + 1, dtype=torch.float64) ** -decay


def _stands_for(value: Tensor, size: int) -> Tensor:
    """The matrix that a value of low rank means."""
    rows, diagonal = low_rank.parts_of(value, size)
    full = rows.mT @ rows
    full.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return full


def _error(value: Tensor, exact: Tensor) -> float:
    return float((_stands_for(value, exact.shape[1]) - exact).norm() / exact.norm())


# -- the form itself -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 60),
    size=st.integers(3, 40),
    rank=st.integers(1, 6),
    decay=st.sampled_from([0.0, 0.5, 2.0]),
    ones=st.booleans(),
    history=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_the_stated_error_holds(
    count: int, size: int, rank: int, decay: float, ones: bool, history: int, seed: int
) -> None:
    """Also after means of several: diagonals exact, what is left out positive semi-definite."""
    value, exact = torch.zeros(()), torch.zeros(())
    for step in range(history):
        rows = _rows(count, size, seed + step, decay)
        fresh = operators.low_rank_moment(rows, ones, rank, 1 / count)
        if ones:
            rows = F.pad(rows, (0, 1), value=1.0)
        dense = rows.mT @ rows / count
        if step:
            value = low_rank.weighted_sum([value, fresh], [0.7, 0.3], rows.shape[2])
            exact = 0.7 * exact + 0.3 * dense
        else:
            value, exact = fresh, dense
    width = exact.shape[1]
    assert value.shape == (1, (rank + 1) * width)
    kept, diagonal = low_rank.parts_of(value, width)
    torch.testing.assert_close(diagonal, exact.diagonal(dim1=1, dim2=2))
    left = exact - kept.mT @ kept
    trace = float(exact.diagonal(dim1=1, dim2=2).sum())
    assert float(torch.linalg.eigvalsh(left).min()) > -1e-9 * trace
    share, error = low_rank.bound(value, width)
    assert share == pytest.approx(float(left.diagonal(dim1=1, dim2=2).sum()) / trace, abs=1e-9)
    assert _error(value, exact) <= error + 1e-9
    off_by = float((_stands_for(value, width) - exact).norm())
    assert off_by <= share * trace * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("count", [30, 400])
def test_nearly_the_best_of_its_rank(count: int) -> None:
    rows = _rows(count, 100, 0)
    exact = rows.mT @ rows
    values = torch.linalg.eigvalsh(exact)[0]
    share, _ = low_rank.bound(operators.low_rank_moment(rows, False, 10, 1.0), 100)
    best = float(values[:-10].sum() / values.sum())
    assert best * (1 - 1e-9) <= share <= 1.02 * best


def test_few_rows_are_kept_as_they_are() -> None:
    rows = _rows(5, 30, 1)
    value = operators.low_rank_moment(rows, True, 8, 0.5)
    padded = F.pad(rows, (0, 1), value=1.0)
    torch.testing.assert_close(_stands_for(value, 31), padded.mT @ padded / 2)
    assert low_rank.bound(value, 31) == pytest.approx((0.0, 0.0), abs=1e-7)


def test_patches_of_a_convolution() -> None:
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 2, False, [0, 0], True)
    packed = operators.patch_moment(x, *geometry, 1, 0.1)
    value = operators.low_rank_patch_moment(x, *geometry, 19, 0.1)
    full = torch.zeros(2, 19, 19, dtype=torch.float64)
    lower = torch.tril_indices(19, 19)
    full[:, lower[0], lower[1]] = packed
    full = full + full.tril(-1).mT
    torch.testing.assert_close(_stands_for(value, 19), full)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_told_and_raises_nothing(bad: float) -> None:
    rows = _rows(50, 12, 2)
    rows[0, 3, 4] = bad
    assert not operators.low_rank_moment(rows, False, 3, 1.0).isfinite().all()


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="rows have shape"):
        operators.low_rank_moment(torch.ones(3, 4), False, 2, 1.0)
    with pytest.raises(ArgumentError, match="of rank 0 and scale"):
        operators.low_rank_moment(torch.ones(1, 3, 4), False, 0, 1.0)
    with pytest.raises(ArgumentError, match="does not hold rows of size 5"):
        low_rank.parts_of(torch.ones(1, 12), 5)
    with pytest.raises(ArgumentError, match="real floating-point"):
        operators.low_rank_moment(torch.ones(1, 3, 4, dtype=torch.int64), False, 2, 1.0)


@pytest.mark.parametrize("far", [0.05, 0.15])
def test_similar_without_the_matrices(far: float) -> None:
    rows = _rows(20, 30, 3)
    old = operators.low_rank_moment(rows, False, 6, 1.0)
    new = old * (1 + far)
    assert bool(similar(low_rank.scaled(old, 1 + far, 30), old, 0.1, LOW_RANK, 30)) == (far < 0.1)
    other = operators.low_rank_moment(_rows(20, 30, 4), False, 6, 1.0)
    apart = float((_stands_for(other, 30) - _stands_for(old, 30)).norm())
    alpha = apart / float(_stands_for(old, 30).norm())
    assert not similar(other, old, 0.99 * alpha, LOW_RANK, 30)
    assert similar(other, old, 1.01 * alpha, LOW_RANK, 30)
    assert new.shape == old.shape


# -- solving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Factored(), LowRank(rank=2)])
def test_solves_what_it_stands_for(solver: Factored | LowRank) -> None:
    value = torch.cat([operators.low_rank_moment(_rows(9, 12, s), False, 3, 1.0) for s in (0, 1)])
    flat = value.view(2, 4, 12)
    some = gradient(2, 7, 12)
    for left, right in ((moment(2, 7), flat), (flat, moment(2, 7))):
        sides = ("left",) if left is flat else ("right",)
        problem = Problem("w", left, right, groups=2, low_rank=sides)
        dense = [_stands_for(value, 12) if side is flat else side for side in (left, right)]
        (found,) = solver.solve([problem], 1e-3)
        (wanted,) = Factored().solve([Problem("w", *dense, groups=2)], 1e-3)
        assert found is not None
        assert wanted is not None
        matrix = some if left is not flat else some.mT.contiguous()
        torch.testing.assert_close(solver.apply(found, matrix), Factored().apply(wanted, matrix))


@pytest.mark.parametrize("solver", [Eigen(), Ekfac()])
def test_solvers_by_eigenvectors_say_that_they_cannot(solver: Eigen | Ekfac) -> None:
    value = operators.low_rank_moment(_rows(9, 12, 0), False, 3, 1.0).view(1, 4, 12)
    with pytest.raises(ArgumentError, match="is of low rank"):
        solver.solve([Problem("w", moment(1, 5), value, low_rank=("right",))], 1e-3)


# -- the pass and the runtime ----------------------------------------------------------------------


def _step(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _data(count: int = 6, width: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def _model(spec: str, make: type[nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 3)) if make is None else make()
    return graphopt.optimize(body.double(), passes=spec, backend="eager", verify="structure")


def _state(model: nn.Module) -> dict[str, Tensor]:
    controller = controller_of(model)
    assert controller is not None
    return controller.session.state("kfac")


def test_two_directions_are_as_wrong_as_they_say_by_brute_force() -> None:
    one = case("mlp")
    tape, loss = compute(one)
    model = graphopt.optimize(
        one.model, passes="kfac{damping=0.01,interval=1,max_dim=1,rank=2}", backend="eager"
    )
    one.loss(model(one.x)).backward()
    sizes = {n: v.shape[1] for n, v in _state(model).items() if n.startswith("now/")}
    found = [f for f in factors(tape, loss) if f.right.shape[1] > 5]
    assert found, "no side is large enough"
    for each in found:
        assert sizes[f"now/{each.weight}:A"] == 3 * each.right.shape[1]
        value = _state(model)[f"now/{each.weight}:A"]
        _, error = low_rank.bound(value, each.right.shape[1])
        assert 0 < _error(value, each.right) <= error + 1e-12


def test_as_many_directions_as_rows_are_the_whole_factor_by_brute_force() -> None:
    one = case("mlp", batch=2)
    tape, loss = compute(one)
    wanted = expected(tape, loss, 0.01)
    model = graphopt.optimize(
        one.model, passes="kfac{damping=0.01,interval=1,max_dim=5,rank=2}", backend="eager"
    )
    one.loss(model(one.x)).backward()
    assert any(side.shape[1] == 3 * 6 for side in _state(model).values() if side.dim() == 2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", ["", ",ema=0.6", ",interval=stale", ",fisher=type2"])
def test_equals_whole_factors_where_nothing_is_left_out(options: str) -> None:
    base = "kfac{damping=0.02" + (options if "interval" in options else f",interval=1{options}")
    exact, flat = _model(base + "}"), _model(f"{base},max_dim=20,rank=18}}")
    for step in range(3):
        x, y = _data(6, seed=step)
        wanted, found = _step(exact, x, y), _step(flat, x, y)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    assert _state(flat)["now/0.weight:A"].shape == (1, 19 * 41)
    assert "0.weight:A, 18 directions of 41 and the diagonal" in flat.explain()  # type: ignore[operator]


def test_micro_batches_add_up() -> None:
    spec = "kfac{damping=0.02,interval=1,max_dim=20,rank=18}"
    x, y = _data(8)
    wanted = _step(_model(spec), x, y)
    model = _model(spec)
    with model.no_sync():  # type: ignore[operator]
        (F.cross_entropy(model(x[:4]), y[:4]) / 2).backward()
    (F.cross_entropy(model(x[4:]), y[4:]) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_the_report_tells_the_error_and_it_holds() -> None:
    spec = "kfac{damping=0.02,interval=1,max_dim=20,rank=4}"
    model = _model(spec)
    x, y = _data(64)
    _step(model, x, y)
    rows = F.pad(x, (0, 1), value=1.0)
    exact = (rows.mT @ rows / len(rows))[None]
    text = model.explain()  # type: ignore[operator]
    assert "A rank 4 and diagonal of 41x41" in text
    told = re.search(r"leaves out ([\d.]+)% of the trace; .* at most ([\d.]+)%", text)
    assert told is not None
    share, error = (float(number) / 100 for number in told.groups())
    assert 0.1 < share < 0.95
    assert _error(_state(model)["now/0.weight:A"], exact) <= error + 1e-4


def test_a_run_resumes_to_the_last_bit() -> None:
    spec = "kfac{damping=0.02,ema=0.5,max_dim=20,rank=4}"
    model = _model(spec)
    for step in range(2):
        _step(model, *_data(16, seed=step))
    saved = graphopt.state_dict(model)
    wanted = _step(model, *_data(16, seed=2))
    other = _model(spec)
    graphopt.load_state_dict(other, saved)
    found = _step(other, *_data(16, seed=2))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


class Wide(nn.Sequential):
    """A layer with a large side of outputs, and one with a large side of inputs."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))


def _drawn(options: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and statistics of one step, always with the same labels drawn."""
    model = _model(f"kfac{{damping=0.02,interval=1{options}}}", Wide)
    torch.manual_seed(5)
    return _step(model, *_data(6, 6)), _state(model)


def test_sides_of_labels_that_are_drawn_from_the_model() -> None:
    wanted, exact = _drawn(",fisher=mc")
    found, _ = _drawn(",fisher=mc,max_dim=20,rank=9")  # more than there are rows
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    _, few = _drawn(",fisher=mc,max_dim=20,rank=2")
    _, empirical = _drawn(",max_dim=20,rank=2")
    for side, size in (("0.weight:G", 40), ("2.weight:A", 41)):
        value, whole = few[f"now/{side}"], unpack(exact[f"now/{side}"])
        assert value.shape == (1, 3 * size)
        assert 0 < _error(value, whole) <= low_rank.bound(value, size)[1] + 1e-12
        drawn = side.endswith("G")  # inputs do not depend on labels
        assert torch.allclose(value, empirical[f"now/{side}"]) == (not drawn)


class Reused(nn.Module):
    """One layer twice; its input gradients and inputs come from both."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(40, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.wide(torch.tanh(self.wide(x)))))


def test_uses_of_one_weight_add_up() -> None:
    x, y = _data(4)
    wanted = _step(_model("kfac{damping=0.02,interval=1}", Reused), x, y)
    found = _step(_model("kfac{damping=0.02,interval=1,max_dim=20,rank=9}", Reused), x, y)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ("rank=0", "A 41 times 1x1"),
        ("rank=21", "A 41 times 1x1"),
        ("rank=4,solver=eigen", "A 41 times 1x1"),
        ("rank=4,solver=ekfac", "A 41 times 1x1"),
        ("rank=4,solver=lowrank", "A rank 4 and diagonal of 41x41"),
    ],
)
def test_declined_where_it_saves_nothing_or_cannot_be_solved(options: str, form: str) -> None:
    model = _model(f"kfac{{max_dim=20,{options}}}")
    _step(model, *_data())
    assert re.search(form, model.explain())  # type: ignore[operator]


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ArgumentError, match="rank=-1 is not a number of directions"):
        Kfac(rank=-1)


def test_a_statistic_that_is_not_finite_is_discarded() -> None:
    model = _model("kfac{damping=0.02,interval=1,max_dim=20,rank=4}")
    x, y = _data(16)
    _step(model, x, y)
    before = _state(model)["now/0.weight:A"].clone()
    with pytest.warns(RuntimeWarning, match="was not finite"):
        _step(model, x * math.nan, y)
    assert torch.equal(_state(model)["now/0.weight:A"], before)
