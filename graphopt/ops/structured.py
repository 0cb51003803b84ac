"""`graphopt::structured_linear` and `structured_dense`: products with a matrix in factors.

    structured_dense(Tensor[] factors, str form, int[] sizes) -> Tensor
    structured_linear(Tensor x, Tensor[] factors, str form, int[] sizes, Tensor? bias=None,
        bool transposed=False) -> Tensor
    structured_matmul(Tensor[] factors, Tensor x, str form, int[] sizes, bool transposed=False)
        -> Tensor

The first is the matrix W [rows, cols]. The others multiply without it: x Wᵀ + bias of
x [..., cols], and W x of x [..., cols, columns]; with Wᵀ in the place of W if transposed. All are
made of ordinary torch operators: a graph in front of autograd holds one call, a graph behind it the
products, with a backward that autograd derives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.structured.form import Form

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("structured_dense(Tensor[] factors, str form, int[] sizes) -> Tensor")
_library.define(
    "structured_linear(Tensor x, Tensor[] factors, str form, int[] sizes, Tensor? bias=None, "
    "bool transposed=False) -> Tensor"
)
_library.define(
    "structured_matmul(Tensor[] factors, Tensor x, str form, int[] sizes, bool transposed=False) "
    "-> Tensor"
)


def _dense(factors: Sequence[Tensor], form: str, sizes: Sequence[int]) -> Tensor:
    return _form(factors, form, sizes).dense(factors)


def _linear(
    x: Tensor,
    factors: Sequence[Tensor],
    form: str,
    sizes: Sequence[int],
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    made = _form(factors, form, sizes)
    if transposed:
        made, factors = made.transposed(factors)
    if x.dim() < 1 or x.shape[-1] != made.cols:
        raise ArgumentError(
            f"structured_linear multiplies [..., {made.cols}], and got {list(x.shape)}"
        )
    result = made.linear(factors, x.reshape(-1, made.cols))
    result = result.reshape(*x.shape[:-1], made.rows)
    # As the operators whose place it takes, whatever is done with the result in place or as a view.
    return (result if bias is None else result + bias).contiguous()


def _matmul(
    factors: Sequence[Tensor],
    x: Tensor,
    form: str,
    sizes: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    made = _form(factors, form, sizes)
    if transposed:
        made, factors = made.transposed(factors)
    if x.dim() < 2 or x.shape[-2] != made.cols:
        raise ArgumentError(
            f"structured_matmul multiplies [..., {made.cols}, columns], and got {list(x.shape)}"
        )
    return made.matmul(factors, x).contiguous()


def _form(factors: Sequence[Tensor], name: str, sizes: Sequence[int]) -> Form:
    from graphopt.structured.forms import FORMS, form_of

    if name not in FORMS:
        raise ArgumentError(f"form {name!r} is none of {', '.join(FORMS)}")
    form = form_of(name, sizes)
    shapes = tuple(tuple(factor.shape) for factor in factors)
    if shapes != form.shapes:
        raise ArgumentError(
            f"factors of shapes {shapes}, where {name} {list(sizes)} needs {form.shapes}"
        )
    return form


_library.impl("structured_dense", _dense, "CompositeImplicitAutograd")
_library.impl("structured_linear", _linear, "CompositeImplicitAutograd")
_library.impl("structured_matmul", _matmul, "CompositeImplicitAutograd")
