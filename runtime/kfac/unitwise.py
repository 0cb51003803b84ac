"""Scale and shift of a norm: one 2 x 2 block per channel, inverted in closed form.

Osawa et al. (TPAMI 2020, arXiv 2002.06015), unit-wise natural gradient: with the moments
p = E[ĝ_scale²], q = E[ĝ_scale ĝ_shift] and r = E[ĝ_shift²] of a channel, the inverse of
[[p, q], [q, r]] + λ I is [[r + λ, -q], [-q, p + λ]] / ((p + λ) (r + λ) - q²).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac.solve import Solution, check_damping


def solve(moments: Tensor, damping: float) -> Solution | None:
    """Inverts the damped block of every channel.

    Rounding may leave a block with p r < q², where no channel has one: q is cut to √(p r). So a
    damped block always has an inverse, and that is positive definite.

    Args:
        moments: shape ``[C, 3]``: p, q, r; or ``[C, 1]``: p alone, where the norm has only a scale
            or only a shift.
        damping: λ; positive.

    Returns:
        ``inverse`` of the same shape and order, in at least float32, and ``damping``. ``None``
        where a number is not finite.

    Raises:
        ArgumentError: λ is not positive, or the shape is another one.
    """
    check_damping(damping)
    if moments.dim() != 2 or moments.shape[1] not in (1, 3):
        raise ArgumentError(
            f"unit-wise moments have shape {tuple(moments.shape)}",
            hint="pass [channels, 3] for scale and shift, or [channels, 1] for one of them",
        )
    # p r - q² cancels; in float64 the products of float32 numbers are exact.
    wide = moments.double()
    if moments.shape[1] == 1:
        inverse = (wide.clamp(min=0) + damping).reciprocal()
    else:
        p, q, r = wide.unbind(1)
        p, r = p.clamp(min=0), r.clamp(min=0)
        # Root by root, as the product of two large float64 numbers may overflow.
        bound = p.sqrt() * r.sqrt()
        q = torch.minimum(torch.maximum(q, -bound), bound)
        determinant = (p * r - q * q).clamp(min=0) + damping * (p + r + damping)
        inverse = torch.stack([r + damping, -q, p + damping], 1) / determinant[:, None]
    inverse = inverse.to(torch.promote_types(moments.dtype, torch.float32))
    if not bool((moments.isfinite() & inverse.isfinite()).all()):
        return None
    return {"inverse": inverse, "damping": wide.new_full((), damping)}


def solve_all(moments: Sequence[Tensor], damping: float) -> list[Solution | None]:
    """`solve` for several norms; those of equal width together, as each is small.

    Args:
        moments: of each norm, on one device.
        damping: λ; positive.

    Returns:
        See `solve`, in the order of the norms.

    Raises:
        ArgumentError: see `solve`.
    """
    solutions: list[Solution | None] = [None] * len(moments)
    kinds: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, each in enumerate(moments):
        kinds.setdefault((each.shape[1:], each.dtype), []).append(index)
    for members in kinds.values():
        together = solve(torch.cat([moments[i] for i in members]), damping)
        if together is None:
            # One of them has no inverse; the others have.
            for i in members:
                solutions[i] = solve(moments[i], damping)
            continue
        parts = torch.split(together["inverse"], [len(moments[i]) for i in members])
        for i, part in zip(members, parts, strict=True):
            solutions[i] = {"inverse": part.clone(), "damping": together["damping"].clone()}
    return solutions


def apply(
    solution: Solution, first: Tensor, second: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Preconditions the gradients of a norm.

    Args:
        solution: result of `solve`.
        first: gradient of the scale, or of the shift where there is no scale; C elements.
        second: gradient of the shift, C elements, where there are both.

    Returns:
        Both preconditioned, in their shapes and dtypes.

    Raises:
        ArgumentError: the gradients do not fit the blocks.
    """
    inverse = solution["inverse"]
    gradients = [first] if second is None else [first, second]
    each = 1 if second is None else 3
    if inverse.shape[1] != each or any(g.numel() != len(inverse) for g in gradients):
        raise ArgumentError(
            f"gradients of shapes {[tuple(g.shape) for g in gradients]} do not fit blocks of "
            f"shape {tuple(inverse.shape)}",
            hint="pass the gradients of the parameters that the moments were computed for",
        )
    flat = [gradient.reshape(-1).to(inverse.dtype) for gradient in gradients]
    if second is None:
        return (flat[0] * inverse[:, 0]).view_as(first).to(first.dtype), None
    top, corner, bottom = inverse.unbind(1)
    scale = (top * flat[0] + corner * flat[1]).view_as(first).to(first.dtype)
    shift = (corner * flat[0] + bottom * flat[1]).view_as(second).to(second.dtype)
    return scale, shift
