"""Forms of matrices: the products of their factors are those of the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.structured import Form, form_of, form_of_shapes
from graphopt.structured.blr import Blr
from graphopt.structured.flat import Flat
from graphopt.structured.hodlr import Hodlr
from graphopt.structured.toeplitz import Toeplitz
from graphopt.structured.truncate import LARGE, least_rank, out_of_reach, split
from graphopt.structured.weight import relative_error

ours = torch.ops.graphopt
sizes = st.integers(1, 9)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Small forms of all kinds."""
    kind = draw(st.sampled_from([Flat, Toeplitz, Blr, Hodlr]))
    m, n = draw(sizes), draw(sizes)
    if kind is Flat:
        return Flat(m, n, draw(st.integers(1, min(m, n))))
    if kind is Toeplitz:
        return Toeplitz(m, n)
    if kind is Blr:
        tiles = draw(st.integers(2, 4))
        return Blr(m * tiles, n * tiles, tiles, draw(st.integers(1, min(m, n))))
    levels = draw(st.integers(1, 3))
    return Hodlr(m << levels, n << levels, levels, draw(st.integers(1, 3)))


def _factors(form: Form, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in form.shapes]


@settings(max_examples=60, deadline=None)
@given(form=forms(), seed=st.integers(0, 9), transposed=st.booleans(), batch=st.integers(1, 3))
def test_products_and_gradients_are_those_of_the_dense_matrix(
    form: Form, seed: int, transposed: bool, batch: int
) -> None:
    factors = [f.requires_grad_() for f in _factors(form, seed)]
    said = (form.name, list(form.sizes))
    dense = ours.structured_dense(factors, *said)
    assert dense.shape == (form.rows, form.cols)
    used = dense.mT if transposed else dense
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, 2, used.shape[1], generator=generator, dtype=torch.float64)
    bias = torch.randn(used.shape[0], generator=generator, dtype=torch.float64)
    columns = torch.randn(batch, used.shape[1], 2, generator=generator, dtype=torch.float64)
    linear = ours.structured_linear(rows, factors, *said, bias, transposed)
    matmul = ours.structured_matmul(factors, columns, *said, transposed)
    for made, want in ((linear, rows @ used.mT + bias), (matmul, used @ columns)):
        assert made.is_contiguous()
        torch.testing.assert_close(made, want, rtol=1e-10, atol=1e-10)
        weights = torch.randn(want.shape, generator=generator, dtype=torch.float64)
        got = torch.autograd.grad((made * weights).sum(), factors, retain_graph=True)
        expected = torch.autograd.grad((want * weights).sum(), factors, retain_graph=True)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(form=forms(), seed=st.integers(0, 9))
def test_factors_of_a_matrix_of_the_form_give_it_back(form: Form, seed: int) -> None:
    weight = form.dense(_factors(form, seed))
    again = form.factors(weight)
    assert tuple(f.shape for f in again) == form.shapes
    assert relative_error(form, again, weight) < 1e-12
    assert form_of(form.name, form.sizes) == form
    assert form_of_shapes(form.rows, form.cols, form.shapes) == form
    assert sum(f.numel() for f in again) == form.numbers


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 30), n=st.integers(1, 30), seed=st.integers(0, 9), share=st.floats(0.01, 0.9)
)
def test_the_least_rank_is_that_of_the_singular_values(
    m: int, n: int, seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(m, n, generator=generator, dtype=torch.float64)
    allowed = share * float(block.norm())
    # The oracle: numpy's decomposition, and every rank in turn.
    s = torch.from_numpy(np.linalg.svd(block.numpy(), compute_uv=False))
    best = next(r for r in range(min(m, n) + 1) if float(s[r:].norm()) <= allowed)
    assert least_rank(block, allowed, min(m, n)) == best
    assert least_rank(block, allowed, best - 1) is None or best == 0
    left, right = split(block, max(best, 1))
    assert float((left @ right - block).norm()) <= allowed * (1 + 1e-9)
    # What is said to be out of reach is.
    for rank in range(min(m, n) + 1):
        if out_of_reach(block, allowed, rank):
            assert float(s[rank:].norm()) > allowed


def test_large_blocks_are_within_their_tolerance() -> None:
    x = torch.linspace(0, 1, LARGE + 88, dtype=torch.float64)
    kernel = torch.exp(-((x[:, None] - x) ** 2) / 0.1)
    s = torch.linalg.svdvals(kernel)
    for tolerance in (1e-2, 1e-5, 1e-8):
        allowed = tolerance * float(kernel.norm())
        rank = least_rank(kernel, allowed, 100)
        best = next(r for r in range(600) if float(s[r:].norm()) <= allowed)
        assert rank is not None
        assert best <= rank <= best + 1
        left, right = split(kernel, rank)
        assert float((left @ right - kernel).norm()) <= allowed
    noise = torch.randn(600, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert out_of_reach(noise, 0.1 * float(noise.norm()), 150)
    assert least_rank(noise, 0.1 * float(noise.norm()), 150) is None


def test_directions_that_a_block_has_none_of_can_be_trained() -> None:
    form = Blr(8, 8, 2, 2)
    weight = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    factors = [f.requires_grad_() for f in form.factors(weight)]
    torch.testing.assert_close(form.dense(factors), weight)
    for _ in range(40):
        loss = (form.dense(factors) - 2).square().sum()
        grads = torch.autograd.grad(loss, factors)
        with torch.no_grad():
            for factor, grad in zip(factors, grads, strict=True):
                factor -= 0.05 * grad
    assert float(loss.detach()) < 1.0  # the blocks off the diagonal have come from 0 to 2


def test_short_types_are_transformed_in_float32() -> None:
    form = Toeplitz(6, 4)
    t = torch.randn(9, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    made = ours.structured_linear(x, [t], form.name, list(form.sizes))
    want = x.float() @ form.dense([t]).float().mT
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.structured_dense([torch.ones(2)], "diagonal", [2, 2]), "'diagonal' is none"),
        (lambda: ours.structured_dense([torch.ones(2)], "toeplitz", [2, 2]), "needs"),
        (
            lambda: ours.structured_linear(torch.ones(3), [torch.ones(3)], "toeplitz", [2, 2]),
            r"multiplies \[\.\.\., 2\]",
        ),
        (
            lambda: ours.structured_matmul([torch.ones(3)], torch.ones(3), "toeplitz", [2, 2]),
            r"multiplies \[\.\.\., 2, columns\]",
        ),
    ],
)
def test_what_does_not_fit_is_said(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ArgumentError, RuntimeError), match=message):
        call()
