"""Solutions, quadratic forms and log-determinants that autograd differentiates, never densely.

With ``w = A^-T g`` for a gradient g of the solution of ``A x = b``, the gradient of b is w and that
of A is ``-w x.T``, which only ever meets A in a product: ``-w . (dA x)``. The derivative of the
log-determinant is the trace of ``A^-1 dA``. Both are left to the `System`, which knows its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class System(Protocol):
    """A square matrix A, a function of tensors, that systems can be solved with.

    Vectors are in the order that A has.
    """

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What A is differentiated by."""
        ...

    def solve(self, b: Tensor, transpose: bool = False) -> Tensor:
        """``A^-1 b`` or ``A^-T b`` of [n] or [n, c]."""
        ...

    def inner_gradient(self, w: Tensor, v: Tensor) -> Sequence[Tensor]:
        """The derivatives of ``sum(w * (A v))`` by the parameters."""
        ...

    def log_determinant(self) -> float:
        """The logarithm of ``|det A|``."""
        ...

    def log_determinant_gradient(self) -> Sequence[Tensor]:
        """Its derivatives by the parameters."""
        ...


def solve(system: System, b: Tensor) -> Tensor:
    """``A^-1 b`` with gradients for b and for the parameters of the system.

    Args:
        system: of A.
        b: [n] or [n, c], in the dtype of A.
    """
    apply: Callable[..., Tensor] = _Solve.apply
    return apply(system, b, *system.parameters)


def log_determinant(system: System) -> Tensor:
    """``log |det A|``, [] float64, with gradients for the parameters of the system."""
    apply: Callable[..., Tensor] = _LogDeterminant.apply
    return apply(system, *system.parameters)


def quadratic(system: System, y: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """``y^T A^-1 y`` of a symmetric A, [] float64, with gradients for y and for the parameters.

    Args:
        system: of A.
        y: one column, [n, 1].
        x: ``A^-1 y``, [n, 1].
        value: of the result, [1].
    """
    apply: Callable[..., Tensor] = _Quadratic.apply
    return apply(system, x, value, y, *system.parameters)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: System, b: Tensor, *parameters: Tensor) -> Tensor:
        ctx.system, ctx.parameters = system, parameters
        x = system.solve(b)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        w = ctx.system.solve(gradient, transpose=True)
        own: list[Tensor | None] = [None] * len(ctx.parameters)
        if any(ctx.needs_input_grad[2:]):
            own = [*_like(ctx.parameters, ctx.system.inner_gradient(-w, x))]
        return None, w, *own


class _LogDeterminant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: System, *parameters: Tensor) -> Tensor:
        ctx.system, ctx.parameters = system, parameters
        device = parameters[0].device if parameters else None
        return torch.tensor(system.log_determinant(), dtype=torch.float64, device=device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [gradient.to(own) * own for own in ctx.system.log_determinant_gradient()]
        return None, *_like(ctx.parameters, found)


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, system: System, x: Tensor, value: Tensor, y: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.system, ctx.parameters = system, parameters
        ctx.save_for_backward(x)
        return value.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        found = ctx.system.inner_gradient(-gradient * x, x)
        return None, None, None, 2 * gradient * x, *_like(ctx.parameters, found)


def _like(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    return [g.to(p).reshape(p.shape) for p, g in zip(parameters, gradients, strict=True)]
