"""Derivatives by the operand and by the kernel's parameters, without the matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.hierarchical.blocks import Dense, Grid, LowRank
from tests.hierarchical.oracles import KERNELS, distances, points

_DOUBLE = torch.float64
TOLERANCE = 1e-7


def _hyper(*values: float) -> list[Tensor]:
    return [torch.tensor(v, dtype=_DOUBLE, requires_grad=True) for v in values]


def _inner(g: Tensor, m: Tensor | h.HMatrix, x: Tensor) -> Tensor:
    return (g * (m @ x)).sum()


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("two", [False, True])
def test_gradients_beside_those_of_the_dense_matrix(name: str, d: int, two: bool) -> None:
    kind, form = KERNELS[name]
    x, y = points("uniform", 260, d), points("clusters", 150, d, 1)
    rows = h.by_points(x, 16)
    columns = h.by_points(y, 16) if two else None
    y = y if two else x
    scale, variance = _hyper(0.4, 1.7)
    v = torch.randn(len(y), 3, dtype=_DOUBLE, requires_grad=True)
    g = torch.randn(len(x), 3, dtype=_DOUBLE)
    kernel = kind(scale=scale, variance=variance)
    found = h.from_kernel(kernel, rows, columns, tolerance=TOLERANCE)
    r = distances(x, y)

    def exact(s: float | Tensor, w: float | Tensor) -> Tensor:
        return w * form(r / s)

    step = 1e-5
    by_scale = (exact(0.4 + step, 1.7) - exact(0.4 - step, 1.7)) / (2 * step)
    expected = [
        _inner(g, by_scale, v.detach()),
        _inner(g, exact(0.4, 1.0), v.detach()),
        exact(0.4, 1.7).T @ g,
    ]
    sizes = [float(by_scale.norm()), float(exact(0.4, 1.0).norm()), float(exact(0.4, 1.7).norm())]
    reach = 20 * TOLERANCE * float(g.norm()) * float(v.detach().norm())
    for loss in (_inner(g, found, v), _inner(v, found.T, g)):
        got = torch.autograd.grad(loss, (scale, variance, v))
        for own, other, size in zip(got, expected, sizes, strict=True):
            assert float((own - other).norm()) <= reach * size / math.sqrt(len(y))


@pytest.mark.parametrize("kind", [h.Exponential, h.Matern52])
def test_one_scale_for_each_coordinate(kind: type[h.Exponential]) -> None:
    x = points("uniform", 200, 2)
    scale = torch.tensor([0.3, 0.9], dtype=_DOUBLE, requires_grad=True)
    g, v = torch.randn(2, 200, 2, dtype=_DOUBLE)
    found = h.from_kernel(kind(scale=scale), h.by_points(x, 16), tolerance=1e-8)
    (got,) = torch.autograd.grad(_inner(g, found, v), scale)
    (expected,) = torch.autograd.grad(_inner(g, kind(scale=scale)(x, x), v), scale)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_levels_have_gradients_that_add_up() -> None:
    x = points("uniform", 200, 2)
    scale, variance = _hyper(0.3, 2.0)
    tree = h.by_points(x, 16)
    found = h.from_kernel(h.Matern32(scale=scale, variance=variance), tree, tolerance=1e-8)
    w, v = torch.randn(2, 200, 3, dtype=_DOUBLE)
    total = [torch.zeros((), dtype=_DOUBLE) for _ in range(2)]
    for number in range(tree.depth + 1):
        own = found.inner_gradient(w, v, number)
        loss = (w * found.apply_level(number, v)).sum()
        for one, other in zip(own, torch.autograd.grad(loss, (scale, variance)), strict=True):
            torch.testing.assert_close(one, other)
        total = [a + b for a, b in zip(total, own, strict=True)]
    for one, other in zip(total, found.inner_gradient(w, v), strict=True):
        torch.testing.assert_close(one, other)


def test_single_precision_has_gradients_too() -> None:
    x = points("uniform", 200, 2)
    scale = torch.tensor(0.3, requires_grad=True)
    kernel = h.Exponential(scale=scale)
    found = h.from_kernel(kernel, h.by_points(x, 16), tolerance=1e-4, dtype=torch.float32)
    g, v = torch.randn(2, 200, 3)
    (got,) = torch.autograd.grad((g * (found @ v)).sum(), scale)
    (expected,) = torch.autograd.grad((g.double() * (kernel(x, x) @ v.double())).sum(), scale)
    assert got.dtype is torch.float32
    assert float((got - expected).abs()) < 1e-2 * float(expected.abs()) + 0.1


def test_a_module_as_kernel() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=_DOUBLE))
            self.frozen = torch.nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            squared = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
            return self.weight[0] * torch.exp(-squared / self.weight[1])

    kernel = Mixed()
    x = points("uniform", 150, 2)
    found = h.from_kernel(kernel, h.by_points(x, 16), tolerance=1e-8)
    g, v = torch.randn(2, 150, 2, dtype=_DOUBLE)
    (g * (found @ v)).sum().backward()
    (expected,) = torch.autograd.grad((g * (kernel(x, x) @ v)).sum(), kernel.weight)
    assert kernel.weight.grad is not None
    torch.testing.assert_close(kernel.weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_what_a_scale_was_computed_from_gets_its_gradient() -> None:
    x = points("uniform", 100, 1)
    log = torch.tensor(-1.0, dtype=_DOUBLE, requires_grad=True)
    found = h.from_kernel(h.Exponential(scale=log.exp()), h.by_points(x, 16), tolerance=1e-8)
    v = torch.randn(100, dtype=_DOUBLE)
    (got,) = torch.autograd.grad((found @ v).sum(), log)
    (expected,) = torch.autograd.grad((h.Exponential(scale=log.exp())(x, x) @ v).sum(), log)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_kept_but_the_operand() -> None:
    x = points("uniform", 400, 2)
    (scale,) = _hyper(0.3)
    found = h.from_kernel(h.Exponential(scale=scale), h.by_points(x, 16), tolerance=1e-4)
    kept: list[int] = []
    v = torch.randn(400, 2, dtype=_DOUBLE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        found @ v
    assert sum(kept) <= 2 * v.numel() + 400


def test_blocks_that_require_a_gradient_get_it() -> None:
    tree = h.by_index(40, 20)
    blocks = [torch.randn(20, 20, dtype=_DOUBLE, requires_grad=True) for _ in range(2)]
    factors = [torch.randn(20, 3, dtype=_DOUBLE, requires_grad=True) for _ in range(4)]
    root = Grid(
        (
            (Dense(blocks[0]), LowRank(factors[0], factors[1])),
            (LowRank(factors[2], factors[3]), Dense(blocks[1])),
        )
    )
    found = h.HMatrix(root, tree, tree, 0.0)
    x = torch.randn(40, 2, dtype=_DOUBLE, requires_grad=True)
    g = torch.randn(40, 2, dtype=_DOUBLE)
    inputs = (*blocks, *factors, x)
    got = torch.autograd.grad(_inner(g, found, x), inputs)
    exact = torch.cat(
        [
            torch.cat([blocks[0], factors[0] @ factors[1].T], 1),
            torch.cat([factors[2] @ factors[3].T, blocks[1]], 1),
        ]
    )
    for own, other in zip(got, torch.autograd.grad(_inner(g, exact, x), inputs), strict=True):
        torch.testing.assert_close(own, other)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x = points("uniform", 60, 1)
    (scale,) = _hyper(0.3)
    found = h.from_kernel(h.Exponential(scale=scale), h.by_points(x, 16))
    v = torch.randn(60, dtype=_DOUBLE, requires_grad=True)
    (own,) = torch.autograd.grad((found @ v).square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        own.sum().backward()
