"""Finds the HODLR factor of a symmetric positive definite operator, from products with it.

From the leaves up, and all nodes of a level at once: random vectors go through what is whitened
already, and the couplings come from the range of the result (Halko, Martinsson and Tropp, Finding
structure with randomness, SIAM Review 53 (2011), algorithm 4.2 with a test for the remainder).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from graphopt.errors import ArgumentError, IndefiniteError
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.processes.whitening import Coupling, Layout, Whitening

# Columns that only measure what the others have missed.
_PROBES = 8


class Operator(Protocol):
    """A symmetric matrix over a cluster tree, in the order of positions.

    A block belongs to the level of the smallest cluster that has its rows and its columns: blocks
    on the diagonal to that of the leaves.
    """

    @property
    def tree(self) -> ClusterTree:
        """Of rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of all entries."""
        ...

    @property
    def bound(self) -> float:
        """Of the Frobenius norm of the difference to the matrix that it stands for."""
        ...

    @property
    def diagonal_bound(self) -> float:
        """Of the absolute trace of that difference."""
        ...

    @property
    def rounding(self) -> float:
        """What rounding adds at most to the product with a vector of norm 1."""
        ...

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What it can be differentiated by."""
        ...

    def product(self, values: Tensor, level: int | None = None) -> Tensor:
        """With [n, k]; of the blocks of one level, or of all."""
        ...

    def inner_gradient(
        self, w: Tensor, v: Tensor, level: int | None = None, own: bool = True
    ) -> list[Tensor]:
        """The derivatives of ``sum(w * product(v, level))`` by the parameters.

        Without `own`, zeros for parameters that `own_gradient` knows.
        """
        ...

    def own_gradient(self, number: Tensor) -> list[Tensor]:
        """What they are for parameters that multiply the matrix, where the sum is a number."""
        ...

    def diagonal(self, level: int) -> Tensor:
        """[2**level, m, m] the diagonal blocks, with zeros where clusters are smaller."""
        ...

    def diagonal_gradient(self, level: int, weights: Tensor) -> list[Tensor]:
        """The derivatives of ``sum(weights * diagonal(level))``, without `own`."""
        ...


def whiten(
    operator: Operator,
    shift: float,
    accuracy: float,
    *,
    leaf: int = 128,
    generator: torch.Generator | None = None,
) -> Whitening:
    """A factor L with ``L L^T ~= operator + shift * identity``.

    Args:
        operator: symmetric, and positive definite with the shift.
        shift: added to the diagonal.
        accuracy: of the couplings: the Frobenius norm, over all of them, of what is cut off in
            whitened coordinates. What is left of ``L^-1 A L^-T - identity`` is a few times as
            large; `Probed` measures it.
        leaf: the most rows of a dense diagonal block.
        generator: of the random vectors.

    Raises:
        IndefiniteError: the matrix is not positive definite, as far as this accuracy tells.
    """
    if not accuracy > 0:
        raise ArgumentError(f"accuracy={accuracy} is not positive", hint="pass 0.01, say")
    layout = Layout.of(operator.tree, leaf)
    found = _leaves(operator, layout, shift)
    budget = accuracy / max(layout.depth, 1) ** 0.5
    rank, growth = 24, 1.5
    for level in reversed(range(layout.depth)):
        coupling = _couple(operator, level, found, budget, int(rank * growth) + _PROBES, generator)
        growth = min(max(coupling.rank / rank, 1.1), 2.0) if found.levels else growth
        rank = max(coupling.rank, 4)
        found = Whitening(layout, found.leaves, (*found.levels, coupling))
    return found


def _leaves(operator: Operator, layout: Layout, shift: float) -> Whitening:
    """Cholesky factors of the leaves."""
    size, count = layout.size, 1 << layout.depth
    blocks = operator.diagonal(layout.depth)
    own = layout.pad(torch.full((len(layout.places),), shift, dtype=operator.dtype))
    missing = layout.pad(torch.ones_like(layout.places)) == 0
    diagonal = torch.where(missing, 1.0, own).view(count, size)
    blocks = blocks + torch.diag_embed(diagonal)
    factors, info = torch.linalg.cholesky_ex(blocks)
    if bool(info.any()):
        raise _indefinite()
    identity = torch.eye(size, dtype=operator.dtype).expand(count, -1, -1)
    inverses = torch.linalg.solve_triangular(factors, identity, upper=False)
    return Whitening(layout, inverses)


def _couple(
    operator: Operator,
    level: int,
    below: Whitening,
    budget: float,
    columns: int,
    generator: torch.Generator | None,
) -> Coupling:
    """The couplings of a level, cut so that their errors have a norm of about `budget`."""
    layout, nodes = below.layout, 1 << level
    rows = layout.rows // (2 * nodes)

    def product(panel: Tensor) -> Tensor:
        """M times second halves, M^T times first halves: halves [nodes, 2, rows, k] of each."""
        inner = layout.cut(below.backward(panel.reshape(layout.rows, -1)))
        outer = below.forward(layout.pad(operator.product(inner, level)))
        return outer.view(nodes, 2, rows, -1)

    def sample(count: int) -> Tensor:
        shape = (len(layout.places), count)
        probes = torch.randn(shape, dtype=operator.dtype, generator=generator)
        return product(layout.pad(probes))

    basis: Tensor | None = None
    while True:
        have = 0 if basis is None else basis.shape[-1]
        new = sample(min(columns, rows - have))
        # All of it anew: orthonormal even where new columns have nothing to add.
        basis, r = torch.linalg.qr(new if basis is None else torch.cat([basis, new], -1))
        if basis.shape[-1] >= rows:
            break
        # The last columns have seen a basis that does not know them.
        probes = min(_PROBES, r.shape[-1])
        missed = r[..., -probes:, -probes:].square().sum() / probes / 2
        if float(missed) <= budget**2 / 4:
            break
        columns = max(basis.shape[-1] // 2, 2 * _PROBES)
    del new, r
    core = basis[:, 0].mT @ product(basis)[:, 0]
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    tail = values.square().flip(1).cumsum(1).flip(1)
    kept = tail > budget**2 / (2 * nodes)
    if bool((values >= 1).any()):
        raise _indefinite()
    rank = int(kept.sum(1).max())
    values = torch.where(kept, values, 0.0)[:, :rank]
    return Coupling(
        basis[:, 0] @ left[..., :rank], basis[:, 1] @ right.mT[..., :rank], values.contiguous()
    )


def _indefinite() -> IndefiniteError:
    return IndefiniteError(
        "the matrix is not positive definite, as far as its factor tells",
        hint="add more to its diagonal (noise, nugget), or ask for a smaller tolerance",
    )
