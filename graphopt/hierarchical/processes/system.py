"""A covariance and its `Inverse` as autograd takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.processes.inverse import Inverse
from graphopt.hierarchical.processes.kernel_operator import KernelOperator


@dataclass(frozen=True, eq=False)
class Covariance:
    """A `System` in the order of positions, symmetric.

    Derivatives are those of the matrix that the operator stands for, as exact as the results.

    Attributes:
        inverse: of the covariance.
        shift: what was added to the diagonal, for its gradient.
        goal: of the norm of whitened residuals of `solve`, relative to that of the right side.
        products: the derivatives of the covariance by the numbers of `KernelOperator.changes`,
            times the one column that `inner_gradient` is for; None for those of the stored matrix.
    """

    inverse: Inverse
    shift: Tensor
    goal: float = 1e-10
    products: Callable[[], list[Tensor]] | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """See `System`: the shift, and those of the operator."""
        return self.shift, *self.inverse.operator.parameters

    def solve(self, b: Tensor, transpose: bool = False) -> Tensor:
        """See `System`."""
        return self.inverse.solve(b, self.goal * float(torch.linalg.vector_norm(b))).x

    def inner_gradient(self, w: Tensor, v: Tensor) -> list[Tensor]:
        """See `System`."""
        operator = self.inverse.operator
        if self.products is None or not isinstance(operator, KernelOperator):
            return [(w * v).sum(), *operator.inner_gradient(w, v)]
        numbers = [(w * product).sum() for product in self.products()]
        return [(w * v).sum(), *operator.gathered(numbers)]

    def log_determinant(self) -> float:
        """See `System`."""
        return self.inverse.log_determinant.value

    def log_determinant_gradient(self) -> list[Tensor]:
        """See `System`."""
        shift, parameters = self.inverse.log_determinant_gradient
        return [shift, *parameters]
