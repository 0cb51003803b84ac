"""Solutions, log-determinants and their gradients are within their bounds of dense ones."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.arithmetic.algebra import shifted
from graphopt.hierarchical.arithmetic.factorization import Factorization
from graphopt.hierarchical.arithmetic.factorize import cholesky, lu
from graphopt.hierarchical.arithmetic.gradients import Factored
from graphopt.hierarchical.arithmetic.parts import apply
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, placed
from graphopt.hierarchical.clusters import by_index, by_points
from graphopt.hierarchical.differentiable import log_determinant, solve
from graphopt.hierarchical.kernel_matrix import from_kernel
from graphopt.hierarchical.kernels import Exponential
from graphopt.hierarchical.matrix import HMatrix
from tests.hierarchical.built import Case, build, cases, few, points


def right_side(n: int, columns: int = 2) -> Tensor:
    """[n, c] normal numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, columns, dtype=torch.float64, generator=generator)


def dense_in_float64(matrix: HMatrix) -> Tensor:
    """[n, n] without the rounding of the products of factors in float32."""
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    inner = apply(matrix.root, eye)
    return matrix.columns.to_original(matrix.rows.to_original(inner).T).T


def check(found: Factorization, values: Tensor) -> list[float]:
    """Everything against the dense matrix; ratios of bounds and errors of solutions."""
    b = right_side(len(values))
    inverse = torch.linalg.inv(values)
    assert torch.linalg.matrix_norm(inverse, 2) <= found.inverse_norm * (1 + 1e-6)
    assert inverse.norm() * (1 - found.distance) <= found.norms.frobenius * (1 + 1e-6)
    ratios = []
    for transpose in (False, True):
        exact = torch.linalg.solve(values.T if transpose else values, b)
        solution = found.solve(b, transpose=transpose)
        error = float((solution.value - exact).norm(dim=0).max())
        assert error <= solution.bound + 1e-13 * exact.norm()
        ratios.append(solution.bound / max(error, 1e-16))
    sign, value = torch.linalg.slogdet(values)
    result = found.logdet()
    assert abs(result.value - float(value)) <= result.bound + 1e-12 * len(values)
    if math.isfinite(result.bound):
        assert found.sign == int(sign)
    return ratios


@given(cases())
@settings(max_examples=15)
def test_lu_solves_within_its_bound(case: Case) -> None:
    check(lu(case.matrix, case.tolerance), case.values)


@given(cases(definite=True))
@settings(max_examples=15)
def test_cholesky_solves_within_its_bound(case: Case) -> None:
    check(cholesky(case.matrix, case.tolerance), case.values)
    check(cholesky(case.matrix, case.tolerance, least_eigenvalue=1.0), case.values)


def test_bounds_are_finite_and_near_the_errors() -> None:
    ratios = [ratio for case in few() for ratio in check(lu(case.matrix, 1e-7), case.values)]
    assert max(ratios) < math.inf
    assert statistics.median(ratios) < 1000


def test_refinement_makes_a_loose_factor_exact() -> None:
    case = Case("exponential", 2, "strong", 180, torch.float64, 1e-10, 0)
    found, b = cholesky(case.matrix, 1e-4), right_side(180)
    exact = torch.linalg.solve(case.values, b)
    errors = [float((found.solve(b, refinements=k).value - exact).norm()) for k in (0, 1, 4)]
    assert errors[1] < errors[0] / 10
    assert errors[2] < 1e-6 * errors[0]
    assert found.solve(b, refinements=4).bound < found.solve(b, refinements=0).bound / 100


def test_a_matrix_singular_within_its_bound_has_no_bound() -> None:
    case = Case("exponential", 1, "hodlr", 100, torch.float64, 1e-8, 0)
    plain = case.matrix
    found = lu(HMatrix(plain.root, plain.rows, plain.columns, 2.0), 1e-8)
    assert found.solve(right_side(100)).bound == math.inf
    assert found.logdet().bound == math.inf
    assert found.inverse_norm == math.inf


def test_nearly_singular_matrices_are_never_wrong() -> None:
    # Smooth kernels without a shift: condition numbers from 1e5 to 1e20.
    where = points(80, 1, seed=0)
    distances = (where - where.T).abs()
    for length in (0.003, 0.03, 0.3):
        k = (-((distances / length) ** 2)).exp() + 1e-12 * torch.eye(80)
        found = lu(build(k, where, "hodlr", 1e-14), 1e-14)
        least = torch.linalg.svdvals(k)[-1]
        assert 1 / found.inverse_norm <= least + 1e-14
        exact, solution = torch.linalg.solve(k, right_side(80)), found.solve(right_side(80))
        assert (solution.value - exact).norm(
            dim=0
        ).max() <= solution.bound + 1e-15 * exact.norm() / least


def test_float32_matrices_are_refined_in_float64() -> None:
    case = Case("matern", 1, "hodlr", 150, torch.float32, 1e-6, 0)
    found, b = cholesky(case.matrix, 1e-6), right_side(150)
    stored = dense_in_float64(case.matrix)
    solution = found.solve(b, refinements=5)
    assert solution.value.dtype == torch.float64
    assert (solution.value - torch.linalg.solve(stored, b)).norm() < 1e-12 * b.norm()
    assert found.solve(b.float()).value.dtype == torch.float32


def test_right_hand_sides_of_all_layouts() -> None:
    case = Case("log", 2, "strong", 60, torch.float64, 1e-8, 0)
    found, b = lu(case.matrix, 1e-8), right_side(60, 6)
    whole = found.solve(b).value
    torch.testing.assert_close(found.solve(b.T.contiguous().T[:, ::2]).value, whole[:, ::2])
    torch.testing.assert_close(found.solve(b[:, 0]).value, whole[:, 0])
    assert found.solve(b[:, :0]).value.shape == (60, 0)
    for wrong, text in (
        (b[:59], "for 60 equations"),
        (b.unsqueeze(0), "for 60 equations"),
        (b.to(torch.complex128), "complex128"),
        (b.long(), "int64"),
        (b * math.nan, "not finite"),
    ):
        with pytest.raises(ArgumentError, match=text):
            found.solve(wrong)


def test_rows_and_columns_of_different_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 50, dtype=torch.float64, generator=generator) + 20 * torch.eye(50)
    rows = build(x, points(50, 1, seed=1), "blr", 1e-3).rows
    columns = build(x, points(50, 1, seed=2), "blr", 1e-3).rows
    moved = x[rows.order][:, columns.order]
    found = lu(HMatrix(Dense(moved), rows, columns, 0.0), 1e-12)
    check(found, x)
    assert found.solve(right_side(50)).bound < 1e-8


@pytest.mark.parametrize("symmetric", [True, False])
def test_random_vectors_say_more_of_the_log_determinant_than_norms(symmetric: bool) -> None:
    case = Case("matern", 2, "hodlr", 200, torch.float64, 1e-12, 0)
    found = (cholesky if symmetric else lu)(case.matrix, 1e-4)
    result, exact = found.logdet(), float(torch.logdet(case.values))
    assert abs(result.value - exact) <= result.bound < 0.3 * found.norms.frobenius * found.bound


# -- gradients -------------------------------------------------------------------------------------


def leaves(block: Block) -> tuple[Block, list[Tensor]]:
    """The same blocks of tensors that require gradients, and these."""
    if isinstance(block, Grid):
        pairs = [[leaves(b) for b in line] for line in block.blocks]
        grid = Grid(tuple(tuple(b for b, _ in line) for line in pairs))
        return grid, [t for line in pairs for _, found in line for t in found]
    if isinstance(block, Dense):
        values = block.values.clone().requires_grad_()
        return Dense(values), [values]
    left, right = block.left.clone().requires_grad_(), block.right.clone().requires_grad_()
    return LowRank(left, right), [left, right]


@pytest.mark.parametrize("structure", ["hodlr", "blr", "strong"])
def test_gradients_are_those_of_the_dense_matrix(structure: str) -> None:
    plain = Case("matern", 2, structure, 70, torch.float64, 1e-9, 0).matrix
    root, tensors = leaves(plain.root)
    matrix = HMatrix(root, plain.rows, plain.columns, plain.bound)
    b = right_side(70).requires_grad_()
    weights = right_side(70) ** 2
    found = lu(matrix, 1e-12)
    system = Factored(matrix, found, 1e-12)
    mine = (solve(system, b) * weights).sum() + 3 * log_determinant(system)
    values = matrix.dense()
    theirs = (torch.linalg.solve(values, b) * weights).sum() + 3 * torch.linalg.slogdet(values)[1]
    torch.testing.assert_close(mine, theirs)
    for one, two in zip(
        torch.autograd.grad(mine, [b, *tensors]),
        torch.autograd.grad(theirs, [b, *tensors]),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-6)


def test_hyperparameters_of_kernels_get_their_gradients() -> None:
    where = points(200, 2, seed=0)
    scale, variance, noise = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 2.0, 0.5)
    )
    matrix = from_kernel(Exponential(scale, variance), by_points(where, 16), tolerance=1e-10)
    found = cholesky(shifted(matrix, noise.item()), 1e-12, least_eigenvalue=0.5)
    b = right_side(200, 1)
    system = Factored(matrix, found, 1e-10, shift=noise)
    mine = (b * solve(system, b)).sum() + log_determinant(system)
    distances = (where.unsqueeze(1) - where).square().sum(2)
    root = torch.where(distances > 0, distances, 1).sqrt() * (distances > 0)
    values = variance * (-root / scale).exp() + noise * torch.eye(200, dtype=torch.float64)
    theirs = b.T @ torch.linalg.solve(values, b) + torch.linalg.slogdet(values)[1]
    parameters = [scale, variance, noise]
    torch.testing.assert_close(mine, theirs.squeeze())
    for one, two in zip(
        torch.autograd.grad(mine, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


def test_gradients_need_no_dense_matrix() -> None:
    plain = Case("exponential", 1, "hodlr", 180, torch.float64, 1e-6, 0).matrix
    root, _ = leaves(plain.root)
    matrix = HMatrix(root, plain.rows, plain.columns, plain.bound)
    biggest = max(t.numel() for p in placed(root) for t in vars(p.block).values() if t is not None)
    sizes: list[int] = []
    found = cholesky(matrix, 1e-6)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        system = Factored(matrix, found, 1e-6)
        (log_determinant(system) + solve(system, right_side(180)).sum()).backward()
    assert 0 < max(sizes) <= 2 * max(biggest, 180) < 180 * 180 / 8


def test_a_gradient_of_a_gradient_of_a_solution_is_refused() -> None:
    matrix = Case("matern", 1, "hodlr", 40, torch.float64, 1e-9, 0).matrix
    b = right_side(40).requires_grad_()
    x = solve(Factored(matrix, lu(matrix, 1e-12), 1e-12), b)
    (own,) = torch.autograd.grad(x.square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        own.sum().backward()


def test_one_row_and_one_column() -> None:
    tree = by_index(1)
    matrix = HMatrix(Dense(torch.tensor([[4.0]])), tree, tree, 0.0)
    for found in (lu(matrix, 1e-5), cholesky(matrix, 1e-5)):
        assert found.solve(torch.tensor([2.0])).value == 0.5
        assert abs(found.logdet().value - math.log(4)) <= found.logdet().bound
