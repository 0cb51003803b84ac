"""Solves, quadratic forms and the log-determinant for autograd.

Results are in the order of positions. Derivatives are those of the matrix that the operator stands
for, as exact as the results; no matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.hierarchical.processes.inverse import Inverse


def log_determinant(inverse: Inverse, shift: Tensor) -> Tensor:
    """Of A, [] float64.

    Args:
        inverse: of A.
        shift: what was added to the diagonal, for its gradient.
    """
    apply: Callable[..., Tensor] = _LogDeterminant.apply
    return apply(inverse, shift, *inverse.operator.parameters)


def solve(inverse: Inverse, shift: Tensor, right: Tensor, goal: float = 1e-8) -> Tensor:
    """``A^-1 right`` of [n, k]; arguments are those of `log_determinant` and `Inverse.solve`."""
    apply: Callable[..., Tensor] = _Solve.apply
    return apply(inverse, goal, shift, right, *inverse.operator.parameters)


def quadratic(inverse: Inverse, shift: Tensor, right: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """``y^T A^-1 y`` of one column y [n, 1], [] float64, with its gradient.

    Args:
        inverse: of A.
        shift: what was added to the diagonal, for its gradient.
        right: y.
        x: ``A^-1 y``, [n, 1].
        value: of the result, [1].
    """
    apply: Callable[..., Tensor] = _Quadratic.apply
    return apply(inverse, x, value, shift, right, *inverse.operator.parameters)


class _LogDeterminant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inverse: Inverse, shift: Tensor, *parameters: Tensor) -> Tensor:
        ctx.inverse, ctx.like = inverse, shift
        return torch.tensor(inverse.log_determinant.value, dtype=torch.float64)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shift, parameters = ctx.inverse.log_determinant_gradient
        own = (gradient * shift).to(ctx.like).reshape(ctx.like.shape)
        return None, own, *((gradient * p).to(p) for p in parameters)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inverse: Inverse, goal: float, shift: Tensor, right: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.inverse, ctx.goal, ctx.like = inverse, goal, shift
        x = inverse.solve(right, goal).x
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        size = float(torch.linalg.vector_norm(gradient))
        right = ctx.inverse.solve(gradient, ctx.goal * size).x
        own = -(right * x).sum().to(ctx.like).reshape(ctx.like.shape)
        return None, None, own, right, *ctx.inverse.operator.inner_gradient(-right, x)


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inverse: Inverse,
        x: Tensor,
        value: Tensor,
        shift: Tensor,
        right: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.inverse, ctx.like = inverse, shift
        ctx.save_for_backward(x)
        return value.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        scaled = -gradient * x
        own = (scaled * x).sum().to(ctx.like).reshape(ctx.like.shape)
        parameters = ctx.inverse.operator.inner_gradient(scaled, x)
        return None, None, None, own, 2 * gradient * x, *parameters
