"""Kernels beside their closed forms, gradients where points coincide, and their own bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import hierarchical as h
from graphopt.hierarchical.interpolation import (
    MOVED,
    Boxes,
    Decay,
    Errors,
    chebyshev,
    lagrange,
    lebesgue,
    nodes_for,
    rounding,
)
from graphopt.hierarchical.kernels import Region
from tests.hierarchical.oracles import KERNELS, distances, geometries, kernels, points

_DOUBLE = torch.float64


@settings(max_examples=25, deadline=None)
@given(name=kernels(), geometry=geometries(), scale=st.floats(0.05, 3), variance=st.floats(0.1, 9))
def test_values_are_those_of_the_closed_form(
    name: str, geometry: tuple[str, int], scale: float, variance: float
) -> None:
    kind, form = KERNELS[name]
    x, y = points(*geometry[:1], 40, geometry[1]), points("uniform", 30, geometry[1], 1)
    y[:5] = x[:5]
    own = kind(scale=scale, variance=variance)
    expected = variance * form(distances(x, y) / scale)
    found = own(x, y)
    assert found.shape == (40, 30)
    allowed = 4 * own.rounding(expected.abs(), x.shape[1])
    assert bool(((found - expected).abs() <= allowed).all())
    batched = own(x.expand(2, 40, -1), y.expand(2, 30, -1))
    assert torch.equal(batched[1], found)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_one_scale_for_each_coordinate(name: str) -> None:
    kind, form = KERNELS[name]
    x = points("uniform", 20, 3)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=_DOUBLE)
    torch.testing.assert_close(kind(scale=scale)(x, x), form(distances(x / scale, x / scale)))


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_gradients_are_finite_where_points_coincide(name: str) -> None:
    kind, form = KERNELS[name]
    x = points("grid", 12, 2)
    scale = torch.tensor(0.7, dtype=_DOUBLE, requires_grad=True)
    variance = torch.tensor(1.3, dtype=_DOUBLE, requires_grad=True)
    weights = torch.randn(12, 12, dtype=_DOUBLE)
    loss = (weights * kind(scale=scale, variance=variance)(x, x)).sum()
    found = torch.autograd.grad(loss, (scale, variance))
    r, step = distances(x, x), 1e-6
    up, down = ((weights * 1.3 * form(r / (0.7 + s))).sum() for s in (step, -step))
    assert float(found[0]) == pytest.approx(float(up - down) / (2 * step), rel=1e-6, abs=1e-6)
    assert float(found[1]) == pytest.approx(float((weights * form(r / 0.7)).sum()), rel=1e-12)


@pytest.mark.parametrize("kind", [h.Logarithm, h.InverseDistance])
def test_the_value_of_equal_points_is_stated(kind: type[h.Logarithm]) -> None:
    x = torch.zeros(2, 1, dtype=_DOUBLE)
    assert kind(at_zero=5.0)(x, x).tolist() == [[5.0, 5.0], [5.0, 5.0]]


def _complex(name: str, w: torch.Tensor) -> torch.Tensor:
    r = w.sqrt()
    if name == "exponential":
        return torch.exp(-r)
    if name == "matern32":
        return (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)
    if name == "matern52":
        return (1 + math.sqrt(5) * r + 5 * w / 3) * torch.exp(-math.sqrt(5) * r)
    if name == "gaussian":
        return torch.exp(-w / 2)
    return 0.5 * w.log() if name == "log" else 1 / r


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_majorants_hold_in_the_complex_plane(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-2, 1, 4000, dtype=_DOUBLE)
    angle = (torch.rand(4000, generator=generator, dtype=_DOUBLE) - 0.5) * 2 * math.pi * 0.999
    w = torch.polar(size, angle)
    region = Region(size, size, w.real)
    value = _complex(name, w)
    if name == "log":
        # Up to a constant: that of the upper end.
        region = Region(size, 2 * size, w.real)
        value = value - 0.5 * (2 * size).log()
    assert bool((value.abs() <= KERNELS[name][0]().majorant(region) * (1 + 1e-12)).all())


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_sizes_and_slopes_hold_on_the_real_line(name: str) -> None:
    kind, form = KERNELS[name]
    r = torch.linspace(0.05, 5, 2000, dtype=_DOUBLE)
    values = form(r)
    slope = ((values[1:] - values[:-1]) / (r[1:] - r[:-1])).abs()
    own = kind()
    assert bool((slope <= own.slope(r[:-1].square()) * (1 + 1e-9)).all())
    assert bool((values.abs() <= own.size(r.square(), r.square()) * (1 + 1e-12)).all())


@settings(max_examples=25, deadline=None)
@given(
    name=kernels(),
    d=st.integers(1, 3),
    scale=st.floats(0.1, 3),
    eta=st.floats(0.5, 3),
    flat=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_interpolation_errors_are_within_the_analytic_bound(
    name: str, d: int, scale: float, eta: float, flat: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind, form = KERNELS[name]
    half = torch.rand(2, d, generator=generator, dtype=_DOUBLE)
    half[0, -1] *= round(flat, 1)
    direction = torch.randn(d, generator=generator, dtype=_DOUBLE)
    span = float(half.norm(dim=1).max()) * 2 / eta + float(half.norm(dim=1).sum())
    centre = torch.stack([torch.zeros(d, dtype=_DOUBLE), span * direction / direction.norm()])
    low, high = centre - half, centre + half
    scales = torch.full((d,), scale, dtype=_DOUBLE)
    own, other = (Boxes.of(low[i : i + 1], high[i : i + 1], scales) for i in (0, 1))
    inside = torch.rand(2, 50, d, generator=generator, dtype=_DOUBLE)
    inside = low.unsqueeze(1) + inside * (high - low).unsqueeze(1)
    kernel = kind(scale=scale)
    size = torch.full((1,), torch.inf, dtype=_DOUBLE)
    errors = Errors(Decay.of(kernel, own, other), Decay.of(kernel, other, own), size)
    exact = form(distances(inside[0], inside[1]) / scale)
    for count in (1, 2, 4, 7):
        nodes = [count] * d
        bound = float(errors.bounds(nodes, nodes))
        if not math.isfinite(bound):
            continue
        grid = chebyshev(low, high, nodes)
        spread = lagrange(inside, low, high, nodes)
        middle = form(distances(grid[0], grid[1]) / scale)
        found = spread[0] @ middle @ spread[1].T
        assert float((found - exact).abs().max()) <= bound + 1e-11 * float(exact.abs().max())
    enough = nodes_for(errors, torch.ones(1, dtype=_DOUBLE), 1e-5, 10**6)
    assert enough is not None
    assert float(errors.bounds(enough, enough)) <= 1e-5


@pytest.mark.parametrize("count", [1, 2, 7, 40, 300, 1000])
def test_interpolation_is_rounded_by_no_more_than_it_says(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    # Of degree 0 to 6, so that few nodes are exact, and at most 1.
    degree = min(count - 1, 6)
    for middle, half in ((0.0, 1.0), (3.25, 0.25), (1000.0, 0.0005)):
        low, high = (torch.full((1, 1), middle + sign * half).double() for sign in (-1, 1))
        x = 2 * torch.rand(1, 400, 1, generator=generator, dtype=_DOUBLE) - 1
        x[0, :2, 0] = torch.tensor([-1.0, 1.0], dtype=_DOUBLE)
        x = torch.maximum(torch.minimum(middle + half * x, high), low)
        values, exact = (
            ((at[0] - middle) / half) ** degree for at in (chebyshev(low, high, [count]), x)
        )
        found = lagrange(x, low, high, [count])[0] @ values
        moved = MOVED * (middle + half) * degree / half
        allowed = rounding([count], displaced=True) + (1 + lebesgue(count)) * moved + 1e-15
        assert float((found - exact).abs().max()) <= allowed


def test_lebesgue_constants_are_bounded() -> None:
    x = torch.linspace(-1, 1, 2001, dtype=_DOUBLE).reshape(1, -1, 1)
    low, high = torch.full((1, 1), -1.0, dtype=_DOUBLE), torch.ones(1, 1, dtype=_DOUBLE)
    for count in (1, 2, 3, 5, 10, 20, 40):
        found = lagrange(x, low, high, [count])[0]
        assert float(found.abs().sum(1).max()) <= lebesgue(count) + 1e-12
        torch.testing.assert_close(found.sum(1), torch.ones(2001, dtype=_DOUBLE))
