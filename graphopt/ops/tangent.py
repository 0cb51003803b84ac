"""`graphopt::add_tangent`: a gradient plus a tangent that may be missing.

The backward of a graph takes a tangent of every output. Where the caller differentiates one of them
only, as with a loss that comes beside its logits, zeros as large as the others would be made and
added. Autograd does neither, and so the sum takes ``None``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("add_tangent(Tensor(a) gradient, Tensor? tangent) -> Tensor(a)")


def _add_tangent(gradient: Tensor, tangent: Tensor | None) -> Tensor:
    return gradient if tangent is None else gradient + tangent


_library.impl("add_tangent", _add_tangent, "CompositeExplicitAutograd")
_library.impl("add_tangent", _add_tangent, "Meta")
