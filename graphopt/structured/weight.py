"""A parameter in the place of which its factors stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import graphopt.ops.structured  # noqa: F401, registers the operator
from graphopt.structured.form import Form


class StructuredWeight(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) of one weight by the factors of a form.

    Args:
        form: the form.
        tolerance: relative error in the Frobenius norm that weights may have which are put in.
        first: factors of the weight that it is registered on, where they are known.
    """

    def __init__(self, form: Form, tolerance: float, first: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.form = form
        self.tolerance = tolerance
        self._first = tuple(first)

    def forward(self, *factors: Tensor) -> Tensor:
        """The weight [rows, cols]."""
        made: Tensor = torch.ops.graphopt.structured_dense.default(
            list(factors), self.form.name, list(self.form.sizes)
        )
        return made

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors of a weight."""
        first, self._first = self._first, ()
        return first or self.form.factors(weight)

    def extra_repr(self) -> str:
        """The form in words."""
        return str(self.form)


def relative_error(form: Form, factors: Sequence[Tensor], weight: Tensor) -> float:
    """Of the factors as they are stored, in the Frobenius norm; 0 for two zeros."""
    wide = weight.double()
    missed = float(torch.linalg.norm(form.dense([f.double() for f in factors]) - wide))
    size = float(torch.linalg.norm(wide))
    return missed / size if size else missed
