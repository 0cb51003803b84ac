"""Operators of PyTorch whose numbers are tensors without dimensions, which may differ per call.

The derivatives of PyTorch's own make constants of such numbers, or ask what they are, while a graph
is traced. Inside of these are eager's kernels, with the number that the tensor holds:

    varied_dropout(x, p) -> (result, what it was multiplied by), where ``0 < p < 1``
    varied_pow(x, exponent)                 x ** exponent, where the exponent is not 0
    varied_add(x, other, alpha)             x + alpha * other, of one shape
    varied_lerp(x, end, weight)             of one shape
    varied_smooth_l1(x, target, reduction, beta), varied_huber(x, target, reduction, delta)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag
) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{name}", fake, lib=_library)
    return getattr(torch.ops.graphopt, name).default


def _differentiable(op: Any, backward: Callable[..., Any]) -> None:
    """Saves all arguments, and for the backward the last output as well."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)), *results[1:])

    def run(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * len(ctx.constants)
        saved = list(ctx.saved_tensors)
        inputs = [saved.pop(0) if value is None else value for value in ctx.constants]
        return backward(grad, ctx.needs_input_grad, *inputs, *saved)

    torch.library.register_autograd(op, run, setup_context=save, lib=_library)


# -- dropout ---------------------------------------------------------------------------------------


def _dropout(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    share = float(p)
    if x.device.type == "cpu":
        kept = torch.empty_like(x).bernoulli_(1 - share).div_(1 - share)
        return x * kept, kept
    result, mask = aten.native_dropout.default(x, share, True)
    return result, mask


def _fake_dropout(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if x.device.type == "cpu" else torch.bool
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


def _dropout_backward(grad: Tensor, kept: Tensor, p: Tensor) -> Tensor:
    if kept.dtype is not torch.bool:
        return grad * kept
    result: Tensor = aten.native_dropout_backward.default(grad, kept, 1 / (1 - float(p)))
    return result


_dropout_op = _define(
    "varied_dropout(Tensor x, Tensor p) -> (Tensor, Tensor)",
    _dropout,
    _fake_dropout,
    torch.Tag.nondeterministic_seeded,
)
_dropout_backward_op = _define(
    "varied_dropout_backward(Tensor grad, Tensor kept, Tensor p) -> Tensor",
    _dropout_backward,
    lambda grad, kept, p: torch.empty_like(grad),
)
_differentiable(
    _dropout_op, lambda grad, needed, x, p, kept: (_dropout_backward_op(grad, kept, p), None)
)


# -- arithmetic ------------------------------------------------------------------------------------


def _scaled(x: Tensor, factor: Tensor, rest: bool) -> Tensor:
    return x * (1 - factor.item() if rest else factor.item())


_scaled_op = _define(
    "varied_scale(Tensor x, Tensor factor, bool rest) -> Tensor",
    _scaled,
    lambda x, factor, rest: torch.empty_like(x),
)


def _pow_backward(grad: Tensor, x: Tensor, exponent: Tensor) -> Tensor:
    number = float(exponent)
    return grad * (number * x.pow(number - 1))


_pow_op = _define(
    "varied_pow(Tensor x, Tensor exponent) -> Tensor",
    lambda x, exponent: x.pow(exponent.item()),
    lambda x, exponent: torch.empty_like(x),
)
_pow_backward_op = _define(
    "varied_pow_backward(Tensor grad, Tensor x, Tensor exponent) -> Tensor",
    _pow_backward,
    lambda grad, x, exponent: torch.empty_like(grad + x),
)
_differentiable(
    _pow_op, lambda grad, needed, x, exponent: (_pow_backward_op(grad, x, exponent), None)
)

_add_op = _define(
    "varied_add(Tensor x, Tensor other, Tensor alpha) -> Tensor",
    lambda x, other, alpha: torch.add(x, other, alpha=alpha.item()),
    lambda x, other, alpha: x + other,
)
_differentiable(
    _add_op,
    lambda grad, needed, x, other, alpha: (
        grad,
        _scaled_op(grad, alpha, False) if needed[1] else None,
        None,
    ),
)

_lerp_op = _define(
    "varied_lerp(Tensor x, Tensor end, Tensor weight) -> Tensor",
    lambda x, end, weight: torch.lerp(x, end, weight.item()),
    lambda x, end, weight: x + end,
)
_differentiable(
    _lerp_op,
    lambda grad, needed, x, end, weight: (
        _scaled_op(grad, weight, True) if needed[0] else None,
        _scaled_op(grad, weight, False) if needed[1] else None,
        None,
    ),
)


# -- losses ----------------------------------------------------------------------------------------


def _loss(name: str, operator: Any, operator_backward: Any) -> None:
    def fake(x: Tensor, target: Tensor, reduction: int, number: Tensor) -> Tensor:
        full = x - target
        return torch.empty_like(full) if reduction == 0 else full.new_empty(())

    schema = "Tensor x, Tensor target, int reduction, Tensor number) -> Tensor"
    op = _define(
        f"{name}({schema}",
        lambda x, target, reduction, number: operator(x, target, reduction, number.item()),
        fake,
    )
    backward = _define(
        f"{name}_backward(Tensor grad, {schema}",
        lambda grad, x, target, reduction, number: operator_backward(
            grad, x, target, reduction, number.item()
        ),
        lambda grad, x, target, reduction, number: torch.empty_like(x - target),
    )

    def differentiate(
        grad: Tensor, needed: Any, x: Tensor, target: Tensor, reduction: int, number: Tensor
    ) -> tuple[Tensor | None, ...]:
        by_x = backward(grad, x, target, reduction, number) if needed[0] else None
        by_target = backward(grad, target, x, reduction, number) if needed[1] else None
        return by_x, by_target, None, None

    _differentiable(op, differentiate)


_loss("varied_smooth_l1", aten.smooth_l1_loss.default, aten.smooth_l1_loss_backward.default)
_loss("varied_huber", aten.huber_loss.default, aten.huber_loss_backward.default)
