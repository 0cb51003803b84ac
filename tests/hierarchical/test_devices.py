"""Matrices on another device stay there: nothing computed from them meets a tensor on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.errors import ArgumentError
from graphopt.hierarchical.arithmetic.gradients import Factored
from graphopt.hierarchical.differentiable import log_determinant, solve
from tests.hierarchical.oracles import distances, points
from tests.support.elsewhere import DEVICE, Watch

_N = 72
_DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    with Watch():
        yield


def _values() -> tuple[h.ClusterTree, Tensor]:
    x = points("uniform", _N, 2)
    return h.by_points(x, 12), torch.exp(-distances(x, x)) + torch.eye(_N)


def _vectors(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_N, 3, generator=generator, dtype=_DOUBLE)


def test_the_second_device_refuses_what_cuda_refuses() -> None:
    there, here = torch.ones(3).to(DEVICE), torch.ones(3)
    assert (there + there).device == DEVICE
    assert (there * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]
    assert torch.arange(3, device=DEVICE).sum().item() == 3
    assert there[torch.tensor([0])].device == DEVICE
    with pytest.raises(RuntimeError, match="meta and on cpu"):
        there + here


@pytest.mark.parametrize("rule", [h.Weak(), h.Strong(), h.Flat()])
@pytest.mark.parametrize("method", ["svd", "random"])
def test_dense_matrices_and_products(rule: h.Weak, method: str) -> None:
    tree, values = _values()
    found = h.from_dense(values.to(DEVICE), tree, tolerance=1e-6, rule=rule, method=method)  # type: ignore[arg-type]
    assert found.device == DEVICE
    x = _vectors()
    for product, exact in (
        (found.apply(x.to(DEVICE)), values @ x),
        (found.T.apply(x.to(DEVICE)), values.T @ x),
    ):
        assert product.value.device == DEVICE
        assert float((product.value.cpu() - exact).norm(dim=0).max()) <= product.bound
    assert float((found.dense().cpu() - values).norm()) <= found.bound
    with pytest.raises(ArgumentError, match="on meta times a tensor on cpu"):
        found @ x


def test_kernel_matrices_are_moved_and_keep_their_gradients() -> None:
    tree, _ = _values()
    scale = torch.tensor(1.0, dtype=_DOUBLE, requires_grad=True)
    here = h.from_kernel(h.Exponential(scale), tree, tolerance=1e-8)
    there = here.to(DEVICE)
    grads = []
    for matrix in (here, there):
        x = _vectors().to(matrix.device).requires_grad_()
        w = _vectors(1).to(matrix.device)
        assert matrix.level_norms(1).device == matrix.device
        grads.append(torch.autograd.grad((w * (matrix @ x)).sum(), (scale, x)))
    assert grads[1][1].device == DEVICE
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two.cpu())


def test_arithmetic() -> None:
    tree, values = _values()
    matrix = h.from_dense(values.to(DEVICE), tree, tolerance=1e-9, rule=h.Strong())
    b, inverse = _vectors(), torch.linalg.inv(values)
    for factors in (h.lu(matrix, 1e-8), h.cholesky(matrix, 1e-8, least_eigenvalue=1.0)):
        solution = factors.solve(b.to(DEVICE))
        assert (
            float((solution.value.cpu() - inverse @ b).norm(dim=0).max()) <= solution.bound < 1e-3
        )
        logdet = factors.logdet()
        assert abs(logdet.value - float(torch.logdet(values))) <= logdet.bound
    square = h.multiply(matrix, h.add(matrix, h.shifted(h.scaled(matrix, 2.0), 1.0), 1e-8), 1e-8)
    exact = values @ (3 * values + torch.eye(_N))
    assert float((square.dense().cpu() - exact).norm()) <= square.bound
    found = h.inverse(matrix, 1e-8)
    assert float((found.dense().cpu() - inverse).norm()) <= found.bound


def test_gradients_of_systems() -> None:
    tree, _ = _values()
    scale = torch.tensor(1.0, dtype=_DOUBLE, requires_grad=True)
    found = []
    for device in ("cpu", DEVICE):
        shift = torch.tensor(1.0, dtype=_DOUBLE, device=device, requires_grad=True)
        matrix = h.from_kernel(h.Exponential(scale), tree, tolerance=1e-10).to(device)
        system = Factored(matrix, h.lu(h.shifted(matrix, 1.0), 1e-10), 1e-10, shift)
        b = _vectors().to(device).requires_grad_()
        loss = (solve(system, b) * b).sum() + log_determinant(system).to(device)
        found.append(torch.autograd.grad(loss, (scale, shift, b)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-6, atol=1e-6)
