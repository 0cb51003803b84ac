"""The oracle of K-FAC is right itself: it computes the same models, and its factors are exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from tests.kfac.brute_force import expected, factors, unit_wise
from tests.kfac.cases import NAMES, Case, case, pieces
from tests.kfac.explicit import compute
from tests.kfac.tape import matrix

NORMS = ["layer_norm", "group_norm", "rms_norm"]


def plain(one: Case) -> dict[str, Tensor]:
    """Gradients of the model itself."""
    model = copy.deepcopy(one.model)
    one.loss(model(one.x)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_the_formulas_are_the_model(name: str) -> None:
    one = case(name)
    tape, loss = compute(one)
    torch.testing.assert_close(loss, one.loss(copy.deepcopy(one.model)(one.x)))
    gradients = torch.autograd.grad(loss, list(tape.parameters.values()))
    theirs = plain(one)
    assert set(theirs) == set(tape.parameters)
    for parameter, gradient in zip(tape.parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_samples_add_up_to_the_gradient_of_every_parameter(name: str) -> None:
    one = case(name)
    tape, loss = compute(one)
    theirs = plain(one)
    seen = set()
    for found in factors(tape, loss):
        bias = theirs[found.bias] if found.bias else None
        groups = found.left.shape[0]
        wanted = matrix(theirs[found.weight], bias, found.kind, groups)
        torch.testing.assert_close(found.gradient, wanted, rtol=1e-9, atol=1e-12)
        seen |= {found.weight, found.bias} - {""}
    for norm in unit_wise(tape, loss):
        torch.testing.assert_close(norm.gradient[:, 0], theirs[norm.scale])
        seen.add(norm.scale)
        if norm.shift:
            torch.testing.assert_close(norm.gradient[:, 1], theirs[norm.shift])
            seen.add(norm.shift)
    assert seen == set(theirs)


@pytest.mark.parametrize("name", ["mlp", "raw_parameters", "in_place", "checkpoint"])
def test_of_one_datum_the_product_is_the_exact_fisher_block(name: str) -> None:
    one = case(name, batch=1)
    tape, loss = compute(one)
    theirs = plain(one)
    for found in factors(tape, loss):
        bias = theirs[found.bias] if found.bias else None
        gradient = matrix(theirs[found.weight], bias, found.kind, 1).reshape(-1)
        torch.testing.assert_close(
            torch.kron(found.left[0], found.right[0]),
            torch.outer(gradient, gradient),
            rtol=1e-9,
            atol=1e-14,
        )


@pytest.mark.parametrize("name", ["layer_norm", "attention", "fused_attention"])
def test_reduced_positions_are_exact_where_their_mean_is_all_that_counts(name: str) -> None:
    one = case(name, batch=1)
    tape, loss = compute(one)
    last = tape.uses[-1].weight  # its outputs are averaged over positions
    gradients = plain(one)
    whole = matrix(gradients[last], gradients[tape.uses[-1].bias], "linear", 1).reshape(-1)
    exact = torch.outer(whole, whole)
    for reduce in (True, False):
        found = next(f for f in factors(tape, loss, reduce=reduce) if f.weight == last)
        product = torch.kron(found.left[0], found.right[0])
        error = (product - exact).norm() / exact.norm()
        assert (error < 1e-9) == reduce, f"relative error {error:.1e}"


@pytest.mark.parametrize("groups", [1, 2])
def test_of_one_datum_at_one_position_a_convolution_is_exact_too(groups: int) -> None:
    whole = case("conv_groups" if groups == 2 else "conv_dilation", batch=1)
    size = 2 if groups == 2 else 3  # as large as the kernel reaches
    one = Case(whole.name, whole.model, whole.x[..., :size, :size], whole.target, whole.criterion)
    tape, loss = compute(one)
    theirs = plain(one)
    found = factors(tape, loss)[0]
    m = matrix(theirs["conv.weight"], theirs["conv.bias"], "conv", groups)
    for group in range(groups):
        gradient = m[group].reshape(-1)
        block = torch.kron(found.left[group], found.right[group])
        torch.testing.assert_close(block, torch.outer(gradient, gradient))


@pytest.mark.parametrize("name", NORMS)
def test_blocks_of_a_norm_are_moments_of_the_gradients_of_single_examples(name: str) -> None:
    one = case(name)
    (norm,) = unit_wise(*compute(one))
    single = [plain(piece) for piece in pieces(one)]
    names = [norm.scale, norm.shift] if norm.shift else [norm.scale]
    for channel in range(norm.moments.shape[0]):
        rows = torch.stack([torch.stack([g[n][channel] for n in names]) for g in single])
        wanted = rows.T @ rows / len(single)
        torch.testing.assert_close(norm.moments[channel], wanted, rtol=1e-9, atol=1e-14)


def test_blocks_of_batch_norm_give_each_example_a_scale_of_its_own() -> None:
    one = case("batch_norm")
    (norm,) = unit_wise(*compute(one))
    model = copy.deepcopy(one.model)
    n = one.x.shape[0]
    scale, shift = (
        p.detach().expand(n, -1).clone().requires_grad_()
        for p in (model.norm.weight, model.norm.bias)  # type: ignore[union-attr]
    )
    h = batch_norm(model.first(one.x), None, None, training=True)  # type: ignore[operator]
    h = torch.tanh(h * scale[..., None, None] + shift[..., None, None])
    output = model.head(h.flatten(2).transpose(1, 2)).mean(1)  # type: ignore[operator]
    both = torch.stack(torch.autograd.grad(one.loss(output), (scale, shift)), -1) * n
    wanted = torch.einsum("ncj,nck->cjk", both, both) / n
    torch.testing.assert_close(norm.moments, wanted, rtol=1e-9, atol=1e-14)


def test_scale_of_a_convolution_is_that_of_sp_ngd() -> None:
    one = case("conv")
    tape, loss = compute(one)
    found = factors(tape, loss)[0]
    n, positions = one.x.shape[0], tape.uses[0].known.shape[1]
    # The trailing ones: their sum over space, averaged over examples, is the number of positions.
    assert found.right[0, -1, -1].item() == pytest.approx(positions)
    (g,) = torch.autograd.grad(loss, tape.uses[0].output)
    assert found.left.diagonal(dim1=1, dim2=2).sum().item() == pytest.approx(
        (g.square().sum() * n * n / (n * positions)).item()
    )


def test_an_embedding_counts_tokens() -> None:
    one = case("embedding")
    found = factors(*compute(one))[0]
    counts = torch.bincount(one.x.flatten(), minlength=7).double()
    torch.testing.assert_close(found.left[0], torch.diag(counts / one.x.numel()))


@pytest.mark.parametrize("name", NAMES)
def test_with_enormous_damping_the_gradient_keeps_its_direction(name: str) -> None:
    one = case(name)
    tape, loss = compute(one)
    theirs = plain(one)
    for parameter, value in expected(tape, loss, 1e12).items():
        torch.testing.assert_close(value * 1e12, theirs[parameter], rtol=1e-4, atol=1e-6)


def test_factored_damping_is_two_solves_as_well() -> None:
    """The textbook form ``G⁻¹ M A⁻¹`` beside the whole Kronecker matrix."""
    one = case("mlp")
    tape, loss = compute(one)
    found = factors(tape, loss)[0]
    g, a, m = found.left[0], found.right[0], found.gradient[0]
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    root = torch.tensor(1e-3, dtype=torch.float64).sqrt()
    g = g + root / pi * torch.eye(len(g), dtype=torch.float64)
    a = a + root * pi * torch.eye(len(a), dtype=torch.float64)
    wanted = g.inverse() @ m @ a.inverse()
    torch.testing.assert_close(expected(tape, loss, 1e-3)["0.weight"], wanted[:, :-1])
    torch.testing.assert_close(expected(tape, loss, 1e-3)["0.bias"], wanted[:, -1])
