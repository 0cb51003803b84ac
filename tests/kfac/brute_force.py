"""K-FAC by hand in double precision: autograd, loops and dense matrices, no code of graphopt.

A `Tape` writes down, while a model is computed by explicit formulas (`tests.kfac.explicit`), what
went into each layer at each position; the gradient of the loss with respect to what came out is
autograd's. From these follow the factors, and from the factors the expected gradient by solving
with the whole Kronecker product.

Conventions (n examples, R positions of each at which a weight is used, a = input with a trailing 1
where there is a bias, ĝ = n ∂L/∂s for a loss that is the mean over the batch):

- a linear map: A = Σ a aᵀ / (nR), G = Σ ĝ ĝᵀ / n;
- a convolution of T = R positions: A = Σ a aᵀ / n, G = Σ ĝ ĝᵀ / (nT), each group for itself;
- an embedding is a linear map of one-hot vectors;
- several uses of one weight: their positions together, R being all of them. A row of a table that
  is also a head belongs to one-hot vectors in one use and to ĝ in the other; each is scaled as what
  it is, so one-hot vectors add Σ e eᵀ / (nR) to the moment of the ĝ of the head;
- scale and shift of a norm: per channel the second moment of the gradients of single examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kfac.tape import Tape, Use, restore


@dataclass(frozen=True)
class Factors:
    """The curvature of one weight with its bias.

    Attributes:
        weight: parameter name.
        bias: parameter name; ``""`` for none.
        kind: that of its first use, save that a linear use comes before an embedding.
        left: moments of the rows of the weight, [groups, rows, rows].
        right: moments of its columns, [groups, columns, columns].
        gradient: of the mean loss, [groups, rows, columns], out of the same samples.
    """

    weight: str
    bias: str
    kind: str
    left: Tensor
    right: Tensor
    gradient: Tensor


def factors(tape: Tape, loss: Tensor, *, reduce: bool = False) -> list[Factors]:
    """One per weight; `loss` is the mean over the batch of what the tape was used for.

    With `reduce`, inputs are averaged and gradients summed over the positions of an example before
    the products, after Eschenhagen et al. 2023; else every position counts for itself.
    """
    sensitivities = torch.autograd.grad(loss, [u.output for u in tape.uses], retain_graph=True)
    together: dict[str, list[tuple[Use, Tensor]]] = {}
    for use, gradient in zip(tape.uses, sensitivities, strict=True):
        together.setdefault(use.weight, []).append((use, gradient * use.output.shape[0]))
    return [_factors(uses, reduce) for uses in together.values()]


def _factors(uses: list[tuple[Use, Tensor]], reduce: bool) -> Factors:
    first = uses[0][0]
    n = first.known.shape[0]
    positions = 1 if reduce else sum(use.known.shape[1] for use, _ in uses)
    kind = next((use.kind for use, _ in uses if use.kind != "embedding"), first.kind)
    if reduce and len({use.kind for use, _ in uses}) > 1:
        raise ValueError(f"{first.weight} is a table and a head: no one side to average")
    spatial = kind in ("conv", "transposed")
    pairs = [(use.kind == "embedding", use.known.detach(), g) for use, g in uses]
    whole = sum(_outer(known, g) if table else _outer(g, known) for table, known, g in pairs) / n
    if reduce:
        table, knowns, gradients = zip(*pairs, strict=True)
        mean = torch.cat(knowns, 1).mean(1, keepdim=True)
        pairs = [(table[0], mean, torch.cat(gradients, 1).sum(1, keepdim=True))]
    left = right = torch.zeros(())
    for is_table, known, gradient in pairs:
        inputs, outputs = _outer(known, known) / n, _outer(gradient, gradient) / n
        if spatial:
            outputs = outputs / positions
        else:
            inputs = inputs / positions
        left = left + (inputs if is_table else outputs)
        right = right + (outputs if is_table else inputs)
    return Factors(first.weight, first.bias, kind, left, right, torch.as_tensor(whole))


def _outer(one: Tensor, other: Tensor) -> Tensor:
    """Sum over examples and positions of the outer products, for each group."""
    return torch.einsum("nrgi,nrgj->gij", one, other)


@dataclass(frozen=True)
class UnitWise:
    """The curvature of one norm.

    Attributes:
        scale: parameter name.
        shift: parameter name; ``""`` for none.
        moments: [C, k, k] with k the number of its parameters.
        gradient: of the mean loss, [C, k].
    """

    scale: str
    shift: str
    moments: Tensor
    gradient: Tensor


def unit_wise(tape: Tape, loss: Tensor, *, per_position: bool = False) -> list[UnitWise]:
    """One per norm; with `per_position`, each position is an example of its own."""
    found = []
    for use in tape.norms:
        (g,) = torch.autograd.grad(loss, use.output, retain_graph=True)
        n = g.shape[0]
        g = g * n
        each = [g * use.normalised.detach(), g] if use.shift else [g * use.normalised.detach()]
        samples = torch.stack(each, -1)  # [n, positions, C, k]
        gradient = samples.sum(1).mean(0)
        samples = samples.flatten(0, 1) if per_position else samples.sum(1)
        moments = torch.einsum("ncj,nck->cjk", samples, samples) / n
        found.append(UnitWise(use.scale, use.shift, moments, gradient))
    return found


def expected(
    tape: Tape, loss: Tensor, damping: float, *, reduce: bool = False
) -> dict[str, Tensor]:
    """The preconditioned gradient of every parameter, factored damping, by dense solves."""
    result: dict[str, Tensor] = {}
    for one in factors(tape, loss, reduce=reduce):
        solved = torch.stack(
            [
                _solve(left, right, gradient, damping)
                for left, right, gradient in zip(one.left, one.right, one.gradient, strict=True)
            ]
        )
        weight = tape.parameters[one.weight]
        bias = tape.parameters[one.bias] if one.bias else None
        names = (one.weight, one.bias) if one.bias else (one.weight,)
        result.update(zip(names, restore(solved, weight, bias, one.kind), strict=True))
    for norm in unit_wise(tape, loss):
        k = norm.gradient.shape[-1]
        damped = norm.moments + damping * torch.eye(k, dtype=norm.moments.dtype)
        solved = torch.linalg.solve(damped, norm.gradient)
        result[norm.scale] = solved[:, 0]
        if norm.shift:
            result[norm.shift] = solved[:, 1]
    return result


def _solve(left: Tensor, right: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """``(G + √λ/π I) ⊗ (A + π√λ I)`` as one matrix; left is G, right is A."""
    rows, columns = gradient.shape
    root = math.sqrt(damping)
    pi = math.sqrt(float(right.trace() / columns) / float(left.trace() / rows))
    g = left + root / pi * torch.eye(rows, dtype=left.dtype)
    a = right + root * pi * torch.eye(columns, dtype=left.dtype)
    whole = torch.kron(g, a)
    return torch.linalg.solve(whole, gradient.reshape(-1)).reshape(rows, columns)
