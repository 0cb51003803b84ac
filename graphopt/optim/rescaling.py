"""Weight rescaling: after an update, give each weight the norm it would have at initialisation.

Osawa et al., arXiv 2002.06015: ``w <- sqrt(2 * d_out) * w / (|w| + eps)``. Before a
normalisation the scale of a weight does not change the output, but it scales the gradient: a norm
that grows over time lowers the effective learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from graphopt.errors import ArgumentError


@torch.no_grad()
def rescale_weights(
    parameters: Tensor | Iterable[Tensor], *, eps: float = 1e-9, only_shrink: bool = False
) -> None:
    """Rescale weights in place to the Frobenius norm ``sqrt(2 * d_out)``; call after each update.

    Meant for the weights of linear and convolution layers that a normalisation follows, whose
    first dimension is d_out. Tensors of fewer than two dimensions (biases, norms) are left alone,
    so `model.parameters()` may be passed. If it holds an embedding or a transposed convolution,
    whose first dimension means something else, pass a selection.

    Args:
        parameters: one tensor or several, [d_out, ...].
        eps: added to the norm, at least 0.
        only_shrink: leave weights whose norm is already below the target, as the authors' code
            does.

    Raises:
        ArgumentError: `eps` is negative, or a tensor is not real floating-point.
    """
    if not eps >= 0:
        raise ArgumentError(f"eps={eps} is negative", hint="use 1e-9")
    for weight in [parameters] if isinstance(parameters, Tensor) else parameters:
        if not weight.is_floating_point():
            raise ArgumentError(
                f"a weight of {weight.dtype} cannot be rescaled",
                hint="pass the floating-point weights",
            )
        if weight.dim() < 2:
            continue
        # In half precision the norm may overflow and the scale is coarse. Nothing is read back to
        # the host, so nothing waits for a GPU.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(weight, dtype=dtype)
        scale = math.sqrt(2 * weight.shape[0]) / (norm + eps)
        if only_shrink:
            scale = scale.clamp(max=1.0)
        weight.copy_(weight.to(dtype) * scale)
