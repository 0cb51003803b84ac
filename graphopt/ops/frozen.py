"""`graphopt::frozen`: marks a value that the runtime may compute once and keep.

``frozen(x)`` is an identity. It states that everything upstream of `x` depends only on parameters
and buffers, so the runtime may compute `x` once and recompute it when one of them changes. A graph
in which the mark is ignored is still right: it computes `x` at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("frozen(Tensor(a) x) -> Tensor(a)")


def _frozen(x: Tensor) -> Tensor:
    alias: Tensor = torch.ops.aten.alias.default(x)
    return alias


# One kernel for every device, for fake and for meta tensors: the result is a view of `x`.
_library.impl("frozen", _frozen, "CompositeExplicitAutograd")
