"""`graphopt::packed_diagonal`: a diagonal as the lower triangle of a matrix, row by row.

packed_diagonal(Tensor diagonal) -> Tensor      [B, d] -> [B, d (d + 1) / 2]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("packed_diagonal(Tensor diagonal) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _packed(diagonal: Tensor) -> Tensor:
    size = diagonal.shape[1]
    index = torch.arange(size, device=diagonal.device)
    packed = diagonal.new_zeros((diagonal.shape[0], size * (size + 1) // 2))
    return packed.index_copy_(1, index * (index + 3) // 2, diagonal)


def _fake(diagonal: Tensor) -> Tensor:
    size = diagonal.shape[1]
    return diagonal.new_empty((diagonal.shape[0], size * (size + 1) // 2))


_library.impl("packed_diagonal", _packed, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt::packed_diagonal", _fake, lib=_library)
