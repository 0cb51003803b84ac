"""Hierarchical matrices on a GPU, against dense ones on the CPU."""

from __future__ import annotations

import pytest
import torch

from graphopt import hierarchical as h
from tests.hierarchical.oracles import distances, points

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_products_and_systems() -> None:
    x = points("uniform", 500, 2)
    values = torch.exp(-distances(x, x)) + torch.eye(500)
    tree = h.by_points(x, 32)
    b = torch.ones(500, 3, dtype=torch.float64)
    kernel = h.from_kernel(h.Exponential(), tree, tolerance=1e-8).to("cuda")
    for matrix in (
        h.from_dense(values.cuda(), tree, tolerance=1e-8, rule=h.Strong()),
        h.shifted(kernel, 1.0),
    ):
        product = matrix.apply(b.cuda())
        assert product.value.is_cuda
        assert float((product.value.cpu() - values @ b).norm(dim=0).max()) <= product.bound
        factors = h.cholesky(matrix, 1e-8, least_eigenvalue=1.0)
        solution = factors.solve(b.cuda())
        assert solution.value.is_cuda
        error = solution.value.cpu() - torch.linalg.solve(values, b)
        assert float(error.norm(dim=0).max()) <= solution.bound < 1e-3
        logdet = factors.logdet()
        assert abs(logdet.value - float(torch.logdet(values))) <= logdet.bound
